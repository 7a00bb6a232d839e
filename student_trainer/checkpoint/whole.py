"""Checkpoints of a run: a folder each, which is complete or counts as not there.

    <run>/checkpoints/step-00000500/
        model/            what `AutoModelForCausalLM.from_pretrained` loads
        optimizer.pt      tensors and plain values, read with weights_only=True: nothing is unpickled
        state.json        step, sample order state, totals
        .complete         written last; a folder without it is not a checkpoint

A checkpoint is written under another name, flushed to disk, renamed, then marked.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.cache.errors import FormatError
from potstill.student_trainer.checkpoint.format import TrainState, load_state
from potstill.student_trainer.checkpoint.replaced import replaced
from potstill.student_trainer.models.build import save_student

_COMPLETE = ".complete"


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: TrainState, *, keep: int
) -> Path:
    """Write a checkpoint below `folder`, then remove all but the newest `keep`; return its folder. For rank 0 only.

    Raises:
        StoreError: the disk does not take it.
    """
    final = folder / f"step-{state.step:08d}"
    with replaced(final, mark=_COMPLETE) as partial:
        save_student(model, partial / "model")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    # Only now that the new one is safe: a crash at any line leaves at least one complete checkpoint.
    for old in _complete(folder)[:-keep]:
        (old / _COMPLETE).unlink()  # first no longer a checkpoint, then no longer there
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint below `folder`; -1 for none."""
    checkpoint = newest_checkpoint(folder)
    return -1 if checkpoint is None else load_state(checkpoint).step


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state of the checkpoint; nothing but tensors and plain values is read.

    Raises:
        FormatError: the file holds anything else, or the state of another optimizer.
    """
    file = checkpoint / "optimizer.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error
    except Exception as error:
        # weights_only raises pickle.UnpicklingError; importing pickle to name it would read as if we unpickled.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise FormatError(f"{str(file)!r} holds more than tensors and is not read") from error


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{_COMPLETE}"))
