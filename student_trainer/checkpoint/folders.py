"""The folders of a run's checkpoints: each is complete or counts as not there.

    <run>/checkpoints/step-00000500/
        model/            what `AutoModelForCausalLM.from_pretrained` loads; of a sharded one the configs only
        optimizer.pt      of a whole one (`whole`)
        shards/           of a sharded one (`sharded`)
        state.json        step, sample order state, totals
        .complete         written last, with the hashes of the others; a folder without it is not a checkpoint

A checkpoint is written under another name, flushed to disk, renamed, then marked. One that is damaged is passed over
for the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from potstill.cache.errors import CorruptSegment
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.checkpoint.marker import COMPLETE, damage
from potstill.student_trainer.checkpoint.replaced import remove_leftovers
from potstill.student_trainer.parallel.group import Group

_LOG = logging.getLogger(__name__)


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint by its folder's name; -1 for none."""
    return -1 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def write_state(state: TrainState, folder: Path) -> None:
    """Write `state.json` into the folder of a new checkpoint; a full disk is an OSError."""
    told = json.dumps(asdict(replace(state, format=2)), indent=1)
    (folder / "state.json").write_text(told, encoding="utf-8")


def keep_newest(newest: Path, keep: int) -> None:
    """Remove all complete checkpoints beside `newest` but the last `keep - 1` before it.

    Only to be called when the new one is safe: a crash at any line leaves at least one complete checkpoint. Those of
    later steps are damaged ones that the run did not go on from.
    """
    complete = _complete(newest.parent)
    here = complete.index(newest)
    for old in [*complete[: max(0, here + 1 - keep)], *complete[here + 1 :]]:
        (old / COMPLETE).unlink()  # first no longer a checkpoint, then no longer there
        shutil.rmtree(old, ignore_errors=True)


def newest_checkpoint(folder: Path, *, good: int = -1) -> Path | None:
    """Find the newest checkpoint below `folder` that is what was written; None where there is none at all.

    Each damaged one that is passed over is named in a warning.

    Args:
        folder: of all checkpoints.
        good: the step of one that was read and compared with its hashes before, and is not again.

    Raises:
        CorruptSegment: there are checkpoints, and all are damaged.
    """
    told = ""
    for checkpoint in reversed(_complete(folder)):
        problem = "" if step_of(checkpoint) == good else damage(checkpoint)
        if not problem:
            if told:
                _LOG.warning("%s; the newest good one is that of step %d", told, step_of(checkpoint))
            return checkpoint
        told += f"{told and '; '}checkpoint {str(checkpoint)!r} is damaged: {problem}"
    if told:
        raise CorruptSegment(f"{told}; none is left to go on from: put one back, or choose another train.out")
    return None


def agreed_checkpoint(run_dir: Path, group: Group, *, good: int = -1) -> Path | None:
    """Find the checkpoint that all workers go on from: rank 0, which has the run's lock, chooses and tells the others.

    What killed writers left is removed. `good` as of `newest_checkpoint`.

    Raises:
        CorruptSegment: as `newest_checkpoint`, on rank 0.
    """
    step = torch.zeros((), dtype=torch.float64, device=group.device)
    if group.rank == 0:
        remove_leftovers(run_dir, is_whole=lambda path: (path / COMPLETE).exists())
        step += step_of(newest_checkpoint(run_dir / "checkpoints", good=good))
    chosen = int(group.all_reduce_sum(step).item())
    return None if chosen < 0 else folder_of(run_dir / "checkpoints", chosen)


def _complete(folder: Path) -> list[Path]:
    """Folders of all marked checkpoints, by step."""
    marked = (path.parent for path in folder.glob(f"step-*/{COMPLETE}"))
    return sorted((path for path in marked if path.name.removeprefix("step-").isdecimal()), key=step_of)
