"""The folder of a run, and the corpus and targets that a run reads.

<run>/config.json     as given, with absolute paths
<run>/metrics.jsonl   tensorboard/   checkpoints/   ray/
<run>/model/          the final student       summary.json    its held-out numbers; only when finished
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.errors import InvalidInput, NotFound, StoreError, Unavailable
from potstill.cache.types import TeacherIdentity
from potstill.student_trainer.checkpoint import newest_checkpoint
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.held_out import choose_held_out, with_copies
from potstill.student_trainer.data.order import SampleOrder
from potstill.student_trainer.data.sources import open_cache, open_sources
from potstill.student_trainer.evaluate import evaluate_student
from potstill.student_trainer.group import default_device
from potstill.student_trainer.models import load_student
from potstill.student_trainer.result import Evaluation, finished_result
from potstill.student_trainer.run_folder import read_config

_LOCK_SECONDS = 5.0
"""Workers that Ray replaces may take so many seconds to be gone."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenRun:
    """The corpus, the order of its rows, and a reader of rows with all teachers' targets."""

    corpus: Corpus
    held_out: NDArray[np.int64]
    """[H] rows to evaluate on, rising."""
    order: SampleOrder
    reader: BatchReader

    @property
    def teachers(self) -> dict[str, TeacherIdentity]:
        """Identity of each teacher, by name."""
        return {source.name: source.identity for source in self.reader.sources}

    @property
    def held(self) -> dict[str, str]:
        """K and encoding that are read of each teacher's targets, by name."""
        return {source.name: source.held for source in self.reader.sources}


@contextmanager
def open_run(config: TrainConfig) -> Iterator[OpenRun]:
    """Open the cache and the teachers, check that they fit, close them at the end.

    Raises:
        UnknownCorpus, UnknownTeacher, NotCommitted, SpecMismatch, UnsupportedField: corpus or targets are not there,
            not complete, or do not fit each other.
        InvalidInput: no training rows are left.
    """
    with open_cache(config.data) as cache:
        corpus = cache.corpus(config.data.corpus)
        held_out = choose_held_out(len(corpus), config.data.held_out, config.data.held_out_seed)
        left_out = with_copies(corpus, held_out)
        if len(left_out) == len(corpus):
            raise InvalidInput(f"data.held_out leaves no row to train on: all {len(corpus)} rows are copies of those")
        order = SampleOrder(corpus.shard_rows, left_out, config.train.seed, config.data.window_shards)
        with open_sources(config, cache, corpus) as sources:
            yield OpenRun(corpus, held_out, order, BatchReader(corpus, sources, config.weights))


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in the run's folder; the lock of a killed one is gone with it.

    Raises:
        Unavailable: another process trains there, and still does after some seconds.
        StoreError: the folder cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"train.out {str(run_dir)!r} cannot be made: {error}") from error
    with (run_dir / ".lock").open("w") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another process is training in {str(run_dir)!r}; wait for it, or stop it"
                    ) from error
                time.sleep(0.1)
        yield


def evaluate_run(run_dir: Path) -> Evaluation:
    """Evaluate a run's final model, or its newest checkpoint, on the run's held-out rows.

    Raises:
        NotFound: no run, or nothing trained yet, in the folder.
        PotstillError: whatever opening the cache or the teachers raises.
    """
    config = read_config(run_dir)
    folder = run_dir / "model"
    # A run that goes on after it was finished has newer checkpoints than its model.
    if finished_result(config) is None or not folder.exists():
        checkpoint = newest_checkpoint(run_dir / "checkpoints")
        if checkpoint is None:
            raise NotFound(f"run {str(run_dir)!r} has no model and no complete checkpoint yet")
        folder = checkpoint / "model"
    with open_run(config) as run:
        model = load_student(folder).to(default_device())
        loop = config.train
        return evaluate_student(model, run.reader, run.held_out, batch_rows=loop.micro_batch_rows, dtype=loop.dtype)
