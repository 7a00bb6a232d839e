"""Runs to be judged: the student, its held-out rows, and the corpora that it was never trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.held_out import with_copies
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.same_tokens import require_tokens_of
from potstill.student_trainer.data.sources import TargetSource, is_projected, open_cache
from potstill.student_trainer.evaluate.judged import Judged, Subject
from potstill.student_trainer.evaluate.result import HELD_OUT
from potstill.student_trainer.models.corpus_tokenizer import model_tokenizer
from potstill.student_trainer.train.named import require_rows
from potstill.student_trainer.train.run import OpenRun, eval_reader, opened_run, rows_with_targets


@contextmanager
def run_to_judge(
    run: Path | str, *, cache: str | None = None, corpora: Sequence[str] = (), rows_needed: bool = True
) -> Iterator[Subject]:
    """Open a run's final model, or its newest checkpoint, with what it is evaluated on and further corpora.

    Args:
        run: its folder, or its URL in an object store.
        cache: where the run's cache is now, if it is not where it was.
        corpora: names of further ones; their rows that are in a corpus of the run are left out.
        rows_needed: refuse a run that has no rows to be judged by.

    Raises:
        NotFound: no run, or nothing trained yet, in the folder.
        InvalidInput: nothing to judge by is left. SpecMismatch: a further corpus has other tokens than the run's.
        PotstillError: whatever opening the cache or the teachers raises.
    """
    with opened_run(run, cache) as (config, read, student), open_cache(config.data) as opened, ExitStack() as stack:
        if rows_needed:
            require_rows(run, config, corpora)
        judged, left = list[Judged](), read.flagged_held_out
        if len(read.held_out):
            told = (f"{counted(left, 'held-out row')} left out, as annotations flag them",) if left else ()
            judged.append(Judged(HELD_OUT, read.corpora, read.reader, read.held_out, opened, told))
        for name, reader in read.eval_readers.items():
            joined = JoinedCorpora((opened.corpus(name),))
            notes = _not_compared(read, reader, name)
            judged.append(Judged(name, joined, reader, rows_with_targets(reader), opened, notes))
        further = [name for name in dict.fromkeys(corpora) if name not in read.eval_readers]
        judged += [_further(config, read, opened, opened.corpus(name), stack) for name in further]
        tokenizer = partial(model_tokenizer, student.config, read.corpus)
        yield Subject(str(run), student, config.train.dtype, tokenizer, judged, read.corpus.name)


def _further(config: TrainConfig, run: OpenRun, cache: Cache | HttpCache, corpus: Corpus, stack: ExitStack) -> Judged:
    require_tokens_of(corpus, run.corpus)
    reader = eval_reader(config, cache, corpus, run.reader, stack)
    rows, seen = rows_with_targets(reader), _of_the_run(run, corpus)
    left = np.setdiff1d(rows, seen)
    if not len(left):
        raise InvalidInput(
            f"no row of corpus {corpus.name!r} is left to evaluate on: {len(seen):,} of {counted(len(corpus), 'row')} "
            "are in the run's own corpora, and others lack targets; name another by --corpus"
        )
    told = f"{counted(len(seen), 'row')} of corpus {corpus.name!r} are in the run's own corpora, and were left out"
    notes = (*([told] if len(seen) else []), *_not_compared(run, reader, corpus.name))
    return Judged(corpus.name, JoinedCorpora((corpus,)), reader, left, cache, notes)


def _not_compared(run: OpenRun, reader: BatchReader, corpus: str) -> tuple[str, ...]:
    """Name the teachers of a run that a reader has not."""
    there = {source.name for source in reader.sources}
    return tuple(
        f"teacher {source.name!r} has no top-k for corpus {corpus!r}, so it was not compared with; run `potstill "
        f"{_way_to_fill(source, corpus)}`"
        for source in run.reader.sources
        if source.name not in there
    )


def _way_to_fill(source: TargetSource, corpus: str) -> str:
    if is_projected(source):
        return f"project --cache ROOT --corpus {corpus} --teacher {source.name} --from TEACHERS"
    return f"prefill --cache ROOT --corpus {corpus} --teacher {source.name}=MODEL --top-k 64"


def _of_the_run(run: OpenRun, corpus: Corpus) -> NDArray[np.int64]:
    """Rows of a corpus that have the tokens of a row of the run's corpora, of which it may be one."""
    own = run.corpora.corpora
    every = [np.arange(len(each), dtype=np.int64) for each in own]
    return with_copies([corpus, *own], [np.zeros(0, np.int64), *every])[0]
