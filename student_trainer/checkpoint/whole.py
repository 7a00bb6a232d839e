"""Whole checkpoints: rank 0 writes the student and the optimizer's state, which every worker has.

model/          what `AutoModelForCausalLM.from_pretrained` loads
optimizer.pt    tensors and plain values, read with weights_only=True: nothing is unpickled
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.cache.errors import FormatError
from potstill.student_trainer.checkpoint.folders import folder_of, keep_newest, write_state
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.checkpoint.marker import mark
from potstill.student_trainer.checkpoint.replaced import replaced
from potstill.student_trainer.models.build import save_student
from potstill.student_trainer.parallel.group import Group


@dataclass(frozen=True, slots=True)
class WholeCheckpoints:
    """Writes whole checkpoints below a folder, and keeps the newest `keep`."""

    folder: Path
    group: Group
    keep: int
    published: Callable[[Path], None]

    def save(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write a checkpoint; see `Checkpoints`."""
        if self.group.rank != 0:
            return
        final = folder_of(self.folder, state.step)
        with replaced(final, mark=mark) as partial:
            save_student(student, partial / "model")
            _save_optimizer(optimizer.state_dict(), partial / "optimizer.pt")
            write_state(state, partial)
        keep_newest(final, self.keep)
        self.published(final)

    def wait(self) -> None:
        """Nothing: `save` returns when all is written."""

    def close(self) -> None:
        """Nothing, likewise."""


def _save_optimizer(state: Mapping[str, Any], file: Path) -> None:
    """Write an optimizer's state; a full disk is an OSError."""
    try:
        with file.open("wb") as out:
            torch.save(dict(state), out)
    except RuntimeError as error:
        # torch's writer tells of its own trouble only; what the disk said is what it met before.
        disk = error.__context__
        if isinstance(disk, OSError):
            raise OSError(disk.errno, disk.strerror, str(file)) from error
        raise


def load_whole_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Give the optimizer its state of a whole checkpoint; nothing but tensors and plain values is read.

    Raises:
        FormatError: the file holds anything else, or the state of another optimizer.
    """
    file = checkpoint / "optimizer.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        group.load_state(optimizer, state)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error
    except Exception as error:
        # weights_only raises pickle.UnpicklingError; importing pickle to name it would read as if we unpickled.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise FormatError(f"{str(file)!r} holds more than tensors and is not read") from error
