"""Loss spikes, after which a run goes back to its last checkpoint and leaves the spike's rows out.

    <run>/skipped.json    the batches that the run leaves out, and why; their rows

What is left out is part of what the order of rows follows from, and is written before training goes on: a run that is
resumed leaves out the same rows, whatever checkpoint it goes on from.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from potstill.cache.errors import FormatError, InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import write_json
from potstill.student_trainer.data.mixture import MixtureOrder
from potstill.student_trainer.metrics.records import Record, read_metrics
from potstill.student_trainer.parallel.group import Group

MOST_ROLLBACKS = 10
"""Rollbacks of a run; one that needs more does not suffer from single batches."""


class Spike(Exception):
    """A step whose loss or cross-entropy is out of line, to go back from."""

    def __init__(self, step: int, told: str) -> None:
        """Name the step, the first being 1, and what it met."""
        super().__init__(told)
        self.step, self.told = step, told


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A batch that is left out."""

    batch: int
    """Number of the batch in the order of rows, from 0."""
    step: int
    """The step that met it, the first being 1."""
    told: str
    """The spike, in words."""
    rows: list[int]
    """Its rows, of all corpora end to end."""


class SpikeWatch:
    """Compares each step's loss with those before it; rank 0 decides for all workers."""

    def __init__(self, config: TrainConfig, group: Group, *, step: int) -> None:
        """Begin after `step` steps, whose losses are in the run's records."""
        self._most, self._group = config.train.rollback_over, group
        self._losses: deque[float] = deque(maxlen=config.train.rollback_window)
        if self._most is not None and group.rank == 0:
            records = read_metrics(config.run_dir)
            self._losses.extend(each["ce"] for each in records if "loss" in each and each["step"] <= step)

    def check(self, step: int, record: Record) -> None:
        """Take the record of a step, the first being 1.

        Raises:
            Spike: it is too far over the losses before it, of which there are enough.
        """
        if self._most is None:
            return
        loss = record["ce"]  # which no schedule of alpha or of weights moves
        mean, deviation = (
            (statistics.fmean(self._losses), statistics.stdev(self._losses))
            if len(self._losses) == self._losses.maxlen
            else (math.inf, 0.0)
        )
        spike = torch.tensor(float(loss > mean + self._most * deviation), device=self._group.device)
        if self._group.all_reduce_sum(spike).item() > 0:
            raise Spike(
                step, f"the cross-entropy is {loss:.4g}, after a mean of {mean:.4g} and a deviation of {deviation:.3g}"
            )
        self._losses.append(loss)


def read_skipped(run_dir: Path) -> list[Skipped]:
    """Read the batches that a run leaves out.

    Raises:
        FormatError: the file is damaged.
    """
    file = _file(run_dir)
    if not file.exists():
        return []
    try:
        return [Skipped(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error


def skip(config: TrainConfig, order: MixtureOrder, spike: Spike, group: Group) -> MixtureOrder:
    """Leave out the batch of a spike: give the order without it, and on rank 0 write it down.

    Raises:
        InvalidInput: there are too many.
    """
    if len(order.skipped) == MOST_ROLLBACKS:
        raise InvalidInput(
            f"at step {spike.step} {spike.told}, after {MOST_ROLLBACKS} rollbacks; try a lower train.lr or a longer "
            "train.warmup"
        )
    rows = order.rank_slice(spike.step - 1, 0, 1).tolist()
    found = Skipped(batch=order.batch(spike.step - 1), step=spike.step, told=spike.told, rows=rows)
    if group.rank == 0:
        write_json(_file(config.run_dir), [asdict(each) for each in [*read_skipped(config.run_dir), found]])
    return replace(order, skipped=(*order.skipped, found.batch))


def _file(run_dir: Path) -> Path:
    return run_dir / "skipped.json"
