"""Models that no run made, judged by every row of a corpus: a teacher itself, a published model, another's student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.plurals import counted
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.same_tokens import require_same_tokens
from potstill.student_trainer.data.settings import DataConfig, TeacherConfig
from potstill.student_trainer.data.sources import TargetSource, open_cache, open_sources
from potstill.student_trainer.evaluate.judged import Judged, Subject
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.corpus_tokenizer import load_model_tokenizer
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.parallel.group import device_for


@contextmanager
def model_to_judge(model: str, cache: str, corpora: Sequence[str]) -> Iterator[Subject]:
    """Open a model that `transformers` loads, and corpora of its tokenizer with all teachers' targets.

    Args:
        model: a folder, or a name on the hub.
        cache: folder or URL.
        corpora: names, at least one.

    Raises:
        InvalidInput: it is no causal language model, or has fewer ids than the corpora.
        LimitExceeded: rows are longer than its positions.
        SpecMismatch: an id of the rows is another token to the model.
        PotstillError: whatever opening the cache raises.
    """
    config = DataConfig(cache=cache, corpus=corpora[0])
    with open_cache(config) as opened, ExitStack() as stack:
        judged = [_judged(model, opened, opened.corpus(name), stack) for name in dict.fromkeys(corpora)]
        together = JoinedCorpora(tuple(each.corpora.corpora[0] for each in judged))
        student, _ = build_student(
            StudentConfig(checkpoint=model),
            seed=0,
            vocab_size=max(each.vocab_size for each in together.corpora),
            row_tokens=max(each.reader.longest_row for each in judged),
        )
        yield Subject(model, student.to(device_for()), "float32", partial(load_model_tokenizer, model), judged)


@contextmanager
def model_alone(model: str) -> Iterator[Subject]:
    """Load a model that is judged by no rows.

    Raises:
        InvalidInput: it is no causal language model.
    """
    student, _ = build_student(StudentConfig(checkpoint=model), seed=0, vocab_size=1, row_tokens=1)
    yield Subject(model, student.to(device_for()), "float32", partial(load_model_tokenizer, model), ())


def _judged(model: str, cache: Cache | HttpCache, corpus: Corpus, stack: ExitStack) -> Judged:
    notes = _check_tokens(model, corpus)
    whole = []
    for name in cache.teachers(corpus.name):
        problem = _incomplete(cache, name, corpus)
        notes += [problem] if problem else []
        whole += [] if problem else [TeacherConfig(name=name)]
    sources = stack.enter_context(open_sources(whole, cache, corpus))
    prefix, problem = _prefix(sources)
    notes += [problem] if problem else []
    joined = JoinedCorpora((corpus,))
    reader = BatchReader(joined, sources, (1.0,) * len(sources), prefix)
    return Judged(corpus.name, joined, reader, np.arange(len(corpus), dtype=np.int64), cache, tuple(notes))


def _incomplete(cache: Cache | HttpCache, teacher: str, corpus: Corpus) -> str:
    """Say why a teacher is not compared with; empty where it is."""
    targets = cache.targets(teacher, corpus.name)
    if not targets.fields.k:
        return f"teacher {teacher!r} has no top-k of corpus {corpus.name!r}, and is not compared with"
    committed = targets.top_k_only().committed
    lacking = int((~committed).sum())
    if not lacking:
        return ""
    return (
        f"teacher {teacher!r} lacks {lacking:,} of {counted(len(committed), 'shard')} of corpus {corpus.name!r}, and "
        f"is not compared with; run `potstill {'project' if targets.fields.alignment else 'prefill'}` for it"
    )


def _prefix(sources: Sequence[TargetSource]) -> tuple[tuple[int, ...], str]:
    """The prefix that all teachers saw; none, and why, where they saw different ones."""
    prefixes = {source.identity.prefix_ids for source in sources}
    if len(prefixes) < 2:
        return next(iter(prefixes), ()), ""
    names = ", ".join(repr(source.name) for source in sources)
    return (), f"the teachers {names} saw different tokens in front of each row, and the model sees none of them"


def _check_tokens(model: str, corpus: Corpus) -> list[str]:
    """Check that the ids in the rows are the same tokens to the model; a note where its tokenizer is not known.

    Raises:
        SpecMismatch: one is not.
    """
    if Path(model).is_dir() and not Path(model, "tokenizer.json").is_file():
        return [f"{model!r} has no tokenizer.json; it was taken to have the tokenizer of corpus {corpus.name!r}"]
    require_same_tokens(corpus, load_tokenizer(model), f"model {model!r}")
    return []
