"""A run's folder and what a run reads.

    <run>/config.json     as given, with absolute paths
    <run>/metrics.jsonl   tensorboard/   checkpoints/   ray/
    <run>/model/          the final student       summary.json    its held-out numbers; only when finished
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.cache import Cache
from cache.errors import FormatError, NotFound, StoreError
from student_trainer.checkpoint import newest_checkpoint, write_json
from student_trainer.config import TrainConfig
from student_trainer.data import BatchReader
from student_trainer.order import SampleOrder, held_out_rows
from student_trainer.sources import CorpusRows, open_sources


@dataclass(frozen=True, slots=True, eq=False)
class OpenRun:
    """The corpus, the order of its rows, and a reader of rows with all teachers' targets."""

    corpus: CorpusRows
    order: SampleOrder
    reader: BatchReader

    @property
    def longest_row(self) -> int:
        """Tokens."""
        return int(np.diff(self.corpus.row_starts).max())


@contextmanager
def open_run(config: TrainConfig) -> Iterator[OpenRun]:
    """Open the cache and the teachers, check that they fit, close them at the end.

    Raises:
        UnknownCorpus, UnknownTeacher, NotCommitted, SpecMismatch, UnsupportedField: what does not fit.
        InvalidInput: no training rows are left.
    """
    cache = Cache.open(config.data.cache)
    corpus = cache.corpus(config.data.corpus)
    held_out = held_out_rows(int(corpus.shard_rows[-1]), config.data.held_out, config.data.held_out_seed)
    order = SampleOrder(corpus.shard_rows, held_out, config.train.seed, config.data.window_shards)
    with open_sources(config, cache, corpus) as sources:
        yield OpenRun(corpus, order, BatchReader(corpus, sources, config.weights))


def prepare_run_dir(config: TrainConfig, *, write: bool) -> None:
    """Check that the folder is new or holds the same run; with `write`, make it and keep the config.

    Raises:
        SpecMismatch: it holds another run.
        StoreError: it cannot be written.
    """
    run_dir = config.run_dir
    if (run_dir / "config.json").exists():
        config.check_continues(read_config(run_dir))
    if write:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"train.out {str(run_dir)!r} cannot be made: {error}") from error
        write_json(run_dir / "config.json", config.to_json())


def read_config(run_dir: Path) -> TrainConfig:
    """The config a run was started with.

    Raises:
        NotFound: no run there. FormatError: not a config of this version.
    """
    file = run_dir / "config.json"
    if not file.exists():
        raise NotFound(f"no run in {str(run_dir)!r}: there is no config.json")
    try:
        return TrainConfig.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error


def trained_model(run_dir: Path) -> tuple[TrainConfig, Path]:
    """A run's config, and the folder of its final model or of its newest checkpoint's.

    Raises:
        NotFound: no run, or nothing trained yet.
    """
    config = read_config(run_dir)
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    finished = run_dir / "model"
    if (run_dir / "summary.json").exists() and finished.exists():
        return config, finished
    if checkpoint is None:
        raise NotFound(f"run {str(run_dir)!r} has no model and no complete checkpoint yet")
    return config, checkpoint / "model"
