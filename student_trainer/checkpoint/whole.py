"""Checkpoints of a run: a folder each, which is complete or counts as not there.

    <run>/checkpoints/step-00000500/
        model/            what `AutoModelForCausalLM.from_pretrained` loads
        optimizer.pt      tensors and plain values, read with weights_only=True: nothing is unpickled
        state.json        step, sample order state, totals
        .complete         written last, with the hashes of the others; a folder without it is not a checkpoint

A checkpoint is written under another name, flushed to disk, renamed, then marked. One that is damaged is passed over
for the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from potstill.cache.errors import CorruptSegment, FormatError
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.checkpoint.marker import COMPLETE, damage, mark
from potstill.student_trainer.checkpoint.replaced import remove_leftovers, replaced
from potstill.student_trainer.models.build import load_student, save_student
from potstill.student_trainer.parallel.group import Group

_LOG = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: Mapping[str, Any], state: TrainState, *, keep: int
) -> Path:
    """Write a checkpoint below `folder`, then remove all but the newest `keep`; return its folder. For rank 0 only.

    Args:
        folder: of all checkpoints.
        model: the whole student.
        optimizer: the whole state of the optimizer.
        state: the progress of the run.
        keep: how many.

    Raises:
        StoreError: the disk does not take it; the older checkpoints stay.
    """
    final = folder / f"step-{state.step:08d}"
    with replaced(final, mark=mark) as partial:
        save_student(model, partial / "model")
        _save_optimizer(optimizer, partial / "optimizer.pt")
        told = json.dumps(asdict(replace(state, format=2)), indent=1)
        (partial / "state.json").write_text(told, encoding="utf-8")
    # Only now that the new one is safe: a crash at any line leaves at least one complete checkpoint. Those of later
    # steps are damaged ones that the run did not go on from.
    complete = _complete(folder)
    here = complete.index(final)
    for old in [*complete[: max(0, here + 1 - keep)], *complete[here + 1 :]]:
        (old / COMPLETE).unlink()  # first no longer a checkpoint, then no longer there
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint below `folder` that is what was written; None where there is none at all.

    Each damaged one that is passed over is named in a warning.

    Raises:
        CorruptSegment: there are checkpoints, and all are damaged.
    """
    told = ""
    for checkpoint in reversed(_complete(folder)):
        problem = damage(checkpoint)
        if not problem:
            if told:
                _LOG.warning("%s; the newest good one is that of step %d", told, _step(checkpoint))
            return checkpoint
        told += f"{told and '; '}checkpoint {str(checkpoint)!r} is damaged: {problem}"
    if told:
        raise CorruptSegment(f"{told}; none is left to go on from: put one back, or choose another train.out")
    return None


def agreed_checkpoint(run_dir: Path, group: Group) -> Path | None:
    """Find the checkpoint that all workers go on from: rank 0, which has the run's lock, chooses and tells the others.

    What killed writers left is removed.

    Raises:
        CorruptSegment: as `newest_checkpoint`, on rank 0.
    """
    step = torch.zeros((), dtype=torch.float64, device=group.device)
    if group.rank == 0:
        remove_leftovers(run_dir, is_whole=lambda path: (path / COMPLETE).exists())
        found = newest_checkpoint(run_dir / "checkpoints")
        step += -1 if found is None else _step(found)
    chosen = int(group.all_reduce_sum(step).item())
    return None if chosen < 0 else run_dir / "checkpoints" / f"step-{chosen:08d}"


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`, damaged or not; -1 for none."""
    complete = _complete(folder)
    return _step(complete[-1]) if complete else -1


def load_model(checkpoint: Path) -> PreTrainedModel:
    """Load the student of a checkpoint, as `load_student`.

    Raises:
        FormatError: it cannot be loaded.
    """
    try:
        return load_student(checkpoint / "model")
    except (OSError, ValueError, SafetensorError) as error:
        raise FormatError(f"{str(checkpoint / 'model')!r} cannot be loaded: {error}") from error


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


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Give the optimizer its state of the checkpoint; nothing but tensors and plain values is read.

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


def _complete(folder: Path) -> list[Path]:
    """Folders of all marked checkpoints, by step."""
    marked = (path.parent for path in folder.glob(f"step-*/{COMPLETE}"))
    return sorted((path for path in marked if path.name.removeprefix("step-").isdecimal()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
