"""The two kinds of checkpoints behind one face: which a run writes, and what is read of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from potstill.cache.errors import FormatError
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.checkpoint.sharded import (
    SHARDS,
    ShardedCheckpoints,
    load_sharded_optimizer,
    load_weights,
)
from potstill.student_trainer.checkpoint.whole import WholeCheckpoints, load_whole_optimizer
from potstill.student_trainer.models.build import load_empty_student, load_student
from potstill.student_trainer.parallel.group import Group


class Checkpoints(Protocol):
    """A writer of checkpoints, which removes all but the newest ones. All workers make the same calls."""

    def save(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write a checkpoint, or begin to, as soon as the one before is complete.

        Raises:
            StoreError: the disk does not take it, or the one before; the older checkpoints stay.
        """

    def wait(self) -> None:
        """Wait until what was saved is complete; raises as `save`."""

    def close(self) -> None:
        """Wait until nothing is being written; raises nothing."""


def checkpoints_of(
    folder: Path, group: Group, keep: int, published: Callable[[Path], None] = lambda _: None
) -> Checkpoints:
    """Make the writer for a group: sharded where its workers share the student, else whole.

    Args:
        folder: of all checkpoints, which all workers see.
        group: the workers, each of which makes one.
        keep: how many checkpoints stay.
        published: called on rank 0 with each that is complete.
    """
    kind = ShardedCheckpoints if group.in_step else WholeCheckpoints
    return kind(folder, group, keep, published)


def load_model(checkpoint: Path, group: Group | None = None) -> PreTrainedModel:
    """Load the student of a checkpoint of either kind, as `load_student`, or as a group shares it.

    Where workers share a student and the checkpoint is sharded, each reads its own part of the weights only.

    Raises:
        FormatError: it cannot be loaded.
    """
    sharded = _is_sharded(checkpoint)

    def make() -> tuple[PreTrainedModel, str]:
        load = load_empty_student if sharded else load_student
        with _told(checkpoint):
            return load(checkpoint / "model"), "float32"

    student, _ = (group or Group()).share(make)
    if sharded:
        with _told(checkpoint):
            load_weights(checkpoint, student)
    return student


def load_optimizer(checkpoint: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Give the optimizer, or a worker's part of it, its state of a checkpoint of either kind.

    Raises:
        FormatError: it cannot be read, or is that of another optimizer.
    """
    if _is_sharded(checkpoint):
        load_sharded_optimizer(checkpoint, student, optimizer)
    else:
        load_whole_optimizer(checkpoint, optimizer, group)


def _is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / SHARDS).is_dir()


@contextmanager
def _told(checkpoint: Path) -> Iterator[None]:
    """Turn what is raised by weights that cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"the student of {str(checkpoint)!r} cannot be loaded: {error}") from error
