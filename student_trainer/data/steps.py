"""One worker's micro-batches of the steps of a run, planned, read ahead and brought to its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from potstill.student_trainer.data.batch import Batch, BatchReader
from potstill.student_trainer.data.memory import keep_freed_memory
from potstill.student_trainer.data.mixture import MixtureOrder
from potstill.student_trainer.data.packing import num_slots, plan_micro_batches
from potstill.student_trainer.data.prefetch import ReadAhead


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Counts of a step's global batch, known before its targets are read."""

    num_labels: int
    num_positions: int
    num_tokens: int
    """Tokens that the students of all workers see, without padding."""
    micro_batches: int
    """Micro-batches of each worker."""
    padding: float
    """Share of the tokens of all workers that is padding."""
    with_targets: bool = True
    """False where the step needs no targets, and none are read."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A worker's part of a step, or a part of that."""

    batch: Batch
    step: StepCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A worker's share of each step, and how it is cut."""

    rank: int
    world_size: int
    micro_batch_rows: int
    pack: bool
    """True if rows may share one (`potstill.student_trainer.data.packing`)."""


Planned = tuple[list[list[int]], StepCounts]
"""Rows of the corpus that share a row, for each row of a micro-batch; and the counts of its step."""

StepStream = ReadAhead[Planned, MicroBatch]


def plan_step(reader: BatchReader, order: MixtureOrder, step: int, part: Part) -> list[Planned]:
    """Plan a worker's micro-batches of the step after `step` steps, from the lengths of all workers' rows."""
    slices = [order.rank_slice(step, rank, part.world_size) for rank in range(part.world_size)]
    counts = reader.measure(np.concatenate(slices))
    lengths = np.split(counts.lengths, np.cumsum([len(each) for each in slices])[:-1])
    plans = plan_micro_batches(lengths, part.micro_batch_rows, reader.longest_row, pack=part.pack)
    slots = sum(num_slots(plan, each) for plan, each in zip(plans, lengths, strict=True))
    mine, rows = plans[part.rank], slices[part.rank]
    told = StepCounts(
        num_labels=counts.num_labels,
        num_positions=counts.num_positions,
        num_tokens=int(counts.lengths.sum()),
        micro_batches=len(mine),
        padding=1 - int(counts.lengths.sum()) / max(slots, 1),
    )
    return [([rows[each].tolist() for each in bins], told) for bins in mine]


def read_steps(
    reader: BatchReader,
    order: MixtureOrder,
    steps: Iterable[int],
    part: Part,
    *,
    readers: int,
    ahead: int,
    pin: bool,
    with_targets: Callable[[int], bool] = lambda _: True,
) -> StepStream:
    """Read a worker's micro-batches of steps, in order; see `ReadAhead`.

    Args:
        reader: of the rows.
        order: of all rows.
        steps: numbers of steps taken before each.
        part: the worker's.
        readers: threads.
        ahead: most micro-batches that wait beside the one in use.
        pin: whether to put tensors where an accelerator copies them from by itself.
        with_targets: whether a step needs targets; of one that does not, none are read.
    """
    keep_freed_memory()
    planned, plain = _planned(reader, order, steps, part, with_targets), reader.without_targets()

    def read(wanted: Sequence[Planned]) -> Iterator[MicroBatch]:
        for taught, same in groupby(wanted, lambda each: each[1].with_targets):
            bins, counts = zip(*same, strict=True)
            for batch, told in zip((reader if taught else plain).read_many(bins), counts, strict=True):
                yield MicroBatch(batch.each(torch.Tensor.pin_memory) if pin else batch, told)

    together = max(ahead // (readers + 1), 1) if reader.is_stored else 1
    size: Callable[[MicroBatch], int] = lambda found: found.batch.num_bytes  # noqa: E731 -- names the type
    return ReadAhead(read, planned, readers=readers, ahead=ahead, together=together, size=size)


def _planned(
    reader: BatchReader, order: MixtureOrder, steps: Iterable[int], part: Part, with_targets: Callable[[int], bool]
) -> Iterator[Planned]:
    """Plan steps; when a window of a corpus begins, the shards of the next one are opened ahead."""
    opened: list[tuple[int, int]] = []
    for step in steps:
        windows = order.windows(order.cursor(step))
        if windows != opened:
            ahead = order.first_rows_of([(epoch, window + 1) for epoch, window in windows])
            reader.open_ahead(ahead if opened else np.concatenate([order.first_rows_of(windows), ahead]))
            opened = windows
        for rows, counts in plan_step(reader, order, step, part):
            yield rows, replace(counts, with_targets=with_targets(step))
