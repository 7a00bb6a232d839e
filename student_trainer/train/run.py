"""The folder of a run, and the corpus and targets that a run reads.

<run>/config.json     as given, with absolute paths
<run>/metrics.jsonl   tensorboard/   checkpoints/   ray/
<run>/model/          the final student       summary.json    its held-out numbers; only when finished
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import CorruptSegment, InvalidInput, NotFound, UnknownTeacher
from potstill.cache.types import TeacherIdentity
from potstill.clients.http_targets import HttpCache
from potstill.clients.patience import Patience
from potstill.student_trainer.checkpoint.checkpoints import load_model
from potstill.student_trainer.checkpoint.folders import newest_checkpoint
from potstill.student_trainer.checkpoint.format import load_state
from potstill.student_trainer.checkpoint.stored import StoredRun
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import read_config
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.flagged import flagged_rows
from potstill.student_trainer.data.held_out import choose_held_out, with_copies
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.missing import lacking_rows
from potstill.student_trainer.data.mixture import MixtureOrder
from potstill.student_trainer.data.order import SampleOrder
from potstill.student_trainer.data.packing import keeps_rows_apart
from potstill.student_trainer.data.repeated import RepeatedBatches
from potstill.student_trainer.data.settings import CorpusConfig, DataConfig, TeacherConfig
from potstill.student_trainer.data.sources import common_prefix, open_cache, open_sources
from potstill.student_trainer.evaluate.result import HELD_OUT, Evaluation, finished_result
from potstill.student_trainer.evaluate.student import batches_of, evaluate_student
from potstill.student_trainer.models.build import load_student
from potstill.student_trainer.parallel.group import Group, device_for
from potstill.student_trainer.train.named import require_rows
from potstill.student_trainer.train.rollback import read_skipped


@dataclass(frozen=True, slots=True, eq=False)
class OpenRun:
    """The corpora, the order of their rows, and readers of rows with all teachers' targets."""

    corpora: JoinedCorpora
    fingerprint: str
    """sha256 of all that is trained and evaluated on, in hex."""
    held_out: NDArray[np.int64]
    """[H] rows to evaluate on, rising."""
    left_out: str
    """sha256 of the rows of each corpus that are not trained on, in hex; empty where there are none."""
    lacking: str
    """sha256 of the rows of each corpus that are skipped for want of targets, in hex; empty where there are none."""
    skipped_rows: int
    """Number of those."""
    flagged: str
    """sha256 of the rows of each corpus that annotations leave out, in hex; empty where there are none."""
    flagged_rows: int
    """Number of those."""
    flagged_held_out: int
    """Number of rows that would be held out and evaluated on, were they not flagged."""
    order: MixtureOrder
    reader: BatchReader
    eval_readers: Mapping[str, BatchReader]
    """Readers of the corpora to evaluate on beside the held-out rows, by name."""
    judged_batches: dict[str, RepeatedBatches] = field(default_factory=dict, repr=False)
    """Batches that this worker evaluates on, by name; made at the first evaluation."""

    @property
    def corpus(self) -> Corpus:
        """The first corpus, whose tokenizer is that of all."""
        return self.corpora.corpora[0]

    @property
    def teachers(self) -> dict[str, TeacherIdentity]:
        """Identity of each teacher, by name."""
        return {source.name: source.identity for source in self.reader.sources}

    @property
    def held(self) -> dict[str, str]:
        """K and encoding that are read of each teacher's targets, by name."""
        return {source.name: source.held for source in self.reader.sources}

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row that the student sees, with its prefix."""
        return max(reader.longest_row for reader in (self.reader, *self.eval_readers.values()))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer and of the prefix."""
        return max(self.corpus.vocab_size, *(token + 1 for token in self.reader.prefix), 0)

    def patient(self, patience: Patience) -> OpenRun:
        """A copy whose readers all go on asking sources that do not answer."""
        others = {name: replace(reader, patience=patience) for name, reader in self.eval_readers.items()}
        return replace(self, reader=replace(self.reader, patience=patience), eval_readers=others)

    def epochs(self, step: int) -> int | dict[str, int]:
        """Tell the epoch of the last row before the end of `step` steps; of several corpora, each one's by name."""
        epochs = self.order.epochs(self.order.cursor(step))
        names = (corpus.name for corpus in self.corpora.corpora)
        return epochs[0] if len(epochs) == 1 else dict(zip(names, epochs, strict=True))


@contextmanager
def open_run(config: TrainConfig) -> Iterator[OpenRun]:
    """Open the cache and the teachers, check that they fit, close them at the end.

    Raises:
        UnknownCorpus, UnknownTeacher, NotCommitted, SpecMismatch, UnsupportedField: corpora or targets are not there,
            not complete, or do not fit each other.
        InvalidInput: no training rows are left.
    """
    data = config.data
    with open_cache(data) as cache, ExitStack() as stack:
        corpora = JoinedCorpora(tuple(cache.corpus(each.name) for each in data.mixture))
        opened = [
            stack.enter_context(open_sources(config.teachers, cache, corpus, data.missing, config.train))
            for corpus in corpora.corpora
        ]
        lacking = [lacking_rows(corpus, parts) for corpus, parts in zip(corpora.corpora, opened, strict=True)]
        held_out = [_held_out(data, each, corpus) for each, corpus in zip(data.mixture, corpora.corpora, strict=True)]
        eval_corpora = tuple(cache.corpus(name) for name in data.eval_corpora)
        everything = JoinedCorpora((*corpora.corpora, *eval_corpora))
        left_out = _left_out(corpora, held_out, eval_corpora)
        flagged = flagged_rows(corpora.corpora, data.leave_out)
        order = _order(config, corpora, _never(corpora, left_out, lacking, flagged))
        sources = tuple(corpora.source(parts) for parts in zip(*opened, strict=True))
        prefix = common_prefix(sources, data.prefix_ids, corpora.corpora[0].vocab_size)
        reader = BatchReader(corpora, sources, config.weights(), prefix)
        eval_readers = {each.name: eval_reader(config, cache, each, reader, stack) for each in eval_corpora}
        judged = _judged(held_out, lacking, flagged)
        yield OpenRun(
            corpora,
            everything.fingerprint,
            corpora.joined(judged),
            _hashed(left_out),
            _hashed(lacking),
            sum(map(len, lacking)),
            _hashed(flagged),
            sum(map(len, flagged)),
            sum(len(np.intersect1d(*each)) for each in zip(held_out, flagged, strict=True)),
            order,
            reader,
            eval_readers,
        )


def _order(config: TrainConfig, corpora: JoinedCorpora, never: Sequence[NDArray[np.int64]]) -> MixtureOrder:
    """The order of the rows of corpora without those that no step has."""
    pairs = zip(corpora.corpora, never, strict=True)
    return MixtureOrder(
        tuple(SampleOrder(each.shard_rows, rows, config.train.seed, config.data.window_shards) for each, rows in pairs),
        corpora.first_rows,
        tuple(each.points for each in config.data.mixture),
        config.train.batch_rows,
        config.train.seed,
        tuple(each.batch for each in read_skipped(config.run_dir)),
    )


def _held_out(data: DataConfig, of: CorpusConfig, corpus: Corpus) -> NDArray[np.int64]:
    share = data.held_out if of.held_out is None else of.held_out
    if share == 0:
        return np.zeros(0, dtype=np.int64)
    return choose_held_out(corpus.document_rows, share, data.held_out_seed, corpus.name)


def _judged(
    held_out: Sequence[NDArray[np.int64]],
    lacking: Sequence[NDArray[np.int64]],
    flagged: Sequence[NDArray[np.int64]],
) -> list[NDArray[np.int64]]:
    """Held-out rows of each corpus that have targets and no flag."""
    judged = [np.setdiff1d(rows, np.union1d(*out)) for rows, *out in zip(held_out, lacking, flagged, strict=True)]
    if any(map(len, held_out)) and not any(map(len, judged)):
        raise InvalidInput(
            f"all {sum(map(len, held_out)):,} held-out rows lack targets, or annotations flag them (data.leave_out); "
            "run `potstill prefill` for them, or choose others by data.held_out_seed"
        )
    return judged


def _left_out(
    corpora: JoinedCorpora, held_out: Sequence[NDArray[np.int64]], eval_corpora: Sequence[Corpus]
) -> list[NDArray[np.int64]]:
    """Rows of each corpus that may not be trained on: held-out ones, those that are in `eval_corpora`, and copies."""
    evaluated = [np.arange(len(each), dtype=np.int64) for each in eval_corpora]
    left_out = with_copies([*corpora.corpora, *eval_corpora], [*held_out, *evaluated])[: len(corpora.corpora)]
    for corpus, rows in zip(corpora.corpora, left_out, strict=True):
        if len(rows) == len(corpus):
            raise InvalidInput(
                f"no row of corpus {corpus.name!r} is left to train on: all {len(corpus):,} are evaluated on, or have "
                "the tokens of one that is"
            )
    return left_out


def _never(
    corpora: JoinedCorpora,
    left_out: Sequence[NDArray[np.int64]],
    lacking: Sequence[NDArray[np.int64]],
    flagged: Sequence[NDArray[np.int64]],
) -> list[NDArray[np.int64]]:
    """Rows of each corpus that no step has."""
    never = [np.union1d(np.union1d(*each), more) for *each, more in zip(left_out, lacking, flagged, strict=True)]
    for corpus, rows, skipped, by_name in zip(corpora.corpora, never, lacking, flagged, strict=True):
        if len(rows) == len(corpus):
            also = f", {len(by_name):,} are flagged by annotations (data.leave_out)" if len(by_name) else ""
            raise InvalidInput(
                f"no row of corpus {corpus.name!r} is left to train on: {len(skipped):,} of {len(corpus):,} lack "
                f"targets{also}, and the others are evaluated on; run `potstill prefill` for it"
            )
    return never


def _hashed(left_out: Sequence[NDArray[np.int64]]) -> str:
    if not any(map(len, left_out)):
        return ""
    digest = hashlib.sha256()
    for rows in left_out:
        digest.update(np.array([len(rows)], dtype="<i8").tobytes())
        digest.update(rows.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def eval_reader(
    config: TrainConfig, cache: Cache | HttpCache, corpus: Corpus, training: BatchReader, stack: ExitStack
) -> BatchReader:
    """Open a reader of a corpus to evaluate on, with the teachers that have a top-k for it; services answer for any."""
    there = [each for each in config.teachers if each.source == "service" or _has_targets(cache, each, corpus)]
    sources = stack.enter_context(open_sources(there, cache, corpus, config.data.missing))
    weights = tuple(weight for each, weight in zip(config.teachers, config.weights(), strict=True) if each in there)
    return replace(training, corpus=JoinedCorpora((corpus,)), sources=sources, weights=weights)


def _has_targets(cache: Cache | HttpCache, teacher: TeacherConfig, corpus: Corpus) -> bool:
    try:
        return cache.targets(teacher.name, corpus.name).fields.k > 0
    except UnknownTeacher:
        return False


def rows_with_targets(reader: BatchReader) -> NDArray[np.int64]:
    """List the rows of a reader's corpus that lack no teacher's targets, rising."""
    rows = np.arange(len(reader.corpus), dtype=np.int64)
    corpora = reader.corpus.corpora if isinstance(reader.corpus, JoinedCorpora) else (reader.corpus,)
    return np.setdiff1d(rows, lacking_rows(corpora[0], reader.sources))


def evaluate_on_all(
    model: nn.Module, run: OpenRun, config: TrainConfig, group: Group | None = None
) -> dict[str, Evaluation]:
    """Evaluate on the held-out rows, under the name `HELD_OUT`, and on each corpus that is for it, under its own."""
    loop, group = config.train, group or Group()
    judged = {name: (reader, rows_with_targets(reader)) for name, reader in run.eval_readers.items()}
    on = {HELD_OUT: (run.reader, run.held_out)} | judged if len(run.held_out) else judged
    if not run.judged_batches:
        pack = config.data.packing and keeps_rows_apart(model)
        cut = partial(batches_of, batch_rows=loop.micro_batch_rows, group=group, pack=pack, readers=config.data.readers)
        run.judged_batches.update({name: cut(*each) for name, each in on.items()})
    return {
        name: evaluate_student(model, *each, group=group, dtype=loop.dtype, batches=run.judged_batches[name])
        for name, each in on.items()
    }


@contextmanager
def opened_run(run: Path | str, cache: str | None = None) -> Iterator[tuple[TrainConfig, OpenRun, PreTrainedModel]]:
    """Open a run to evaluate it: its config, what it reads, and its final model or newest checkpoint's.

    Args:
        run: its folder, or its URL in an object store.
        cache: where the run's cache is now, if it is not where it was.

    Raises:
        NotFound: no run, or nothing trained yet, in the folder.
        SpecMismatch: an earlier version chose other rows, so that these were trained on.
        PotstillError: whatever opening the cache or the teachers raises.
    """
    with ExitStack() as stack:
        folder = Path(run)
        if "://" in str(run):
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="potstill-run-")))
            StoredRun.open(str(run), folder, write=False).bring()
            if not (folder / "config.json").exists():
                raise NotFound(f"no run at {run}: nothing that a run puts in a store is there")
        yield stack.enter_context(_opened_folder(folder, cache))


@contextmanager
def _opened_folder(run_dir: Path, cache: str | None) -> Iterator[tuple[TrainConfig, OpenRun, PreTrainedModel]]:
    config = read_config(run_dir, cache)
    # A run that goes on after it was finished has newer checkpoints than its model.
    finished = finished_result(config) is not None and (run_dir / "model").exists()
    try:
        checkpoint = newest_checkpoint(run_dir / "checkpoints")
    except CorruptSegment:
        if not finished:
            raise
        checkpoint = None  # the model is whole without them
    if not finished and checkpoint is None:
        raise NotFound(f"run {str(run_dir)!r} has no model and no complete checkpoint yet")
    with open_run(config) as run:
        if checkpoint is not None:
            load_state(checkpoint).check_rows(run.left_out, run.reader.prefix)
        student = load_student(run_dir / "model") if finished or checkpoint is None else load_model(checkpoint)
        yield config, run, student.to(device_for(config.train.device))


def evaluate_run(run: Path | str) -> dict[str, Evaluation]:
    """Evaluate a run's final model, or its newest checkpoint, as the run itself does at its end.

    Returns:
        As `evaluate_on_all`; at least one.

    Raises:
        InvalidInput: it has nothing to evaluate on. PotstillError: whatever `opened_run` raises.
    """
    with opened_run(run) as (config, opened, student):
        require_rows(run, config)
        return evaluate_on_all(student, opened, config)
