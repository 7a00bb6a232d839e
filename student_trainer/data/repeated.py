"""Batches that are read again and again, as for evaluations: the first of them stay in memory for the next time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from potstill.student_trainer.data.batch import Batch, BatchReader
from potstill.student_trainer.data.packing import plan_micro_batches
from potstill.student_trainer.data.prefetch import ReadAhead

_KEPT_BYTES = 128 << 20
_PLANNED_BATCHES = 16
_CLOSE_SECONDS = 5.0


class RepeatedBatches:
    """Batches of some rows, the same every time; what is not in memory is read ahead while that is used.

    Args:
        reader: of the rows.
        rows: row indexes, [N].
        batch_rows: most rows of a batch.
        pack: whether rows may share one.
        readers: threads that read ahead.
    """

    def __init__(
        self, reader: BatchReader, rows: NDArray[np.int64], batch_rows: int, *, pack: bool, readers: int
    ) -> None:
        self._reader, self._rows, self._batch_rows = reader, rows, batch_rows
        self._pack, self._readers = pack, readers
        self._kept: list[Batch] = []

    @contextmanager
    def read(self) -> Iterator[Iterator[Batch]]:
        """Give the batches, one after the other, within the block; raises what reading raises."""
        kept = list(self._kept)
        size = sum(batch.num_bytes for batch in kept)
        ahead = ReadAhead(
            self._reader.read_many,
            self._planned(skip=len(kept)),
            readers=self._readers,
            ahead=2 * self._readers,
            size=lambda batch: batch.num_bytes,
        )

        def all_of_them(size: int) -> Iterator[Batch]:
            yield from kept
            for batch in ahead:
                size += batch.num_bytes
                if size <= _KEPT_BYTES:
                    self._kept.append(batch)
                yield batch

        with ahead.until_closed(_CLOSE_SECONDS):
            yield all_of_them(size)

    def _planned(self, skip: int) -> Iterator[list[list[int]]]:
        """Plan the batches after the first ones, from many rows at a time, as each has a few bytes only."""
        step = _PLANNED_BATCHES * self._batch_rows
        for start in range(0, len(self._rows), step):
            part = self._rows[start : start + step]
            lengths = self._reader.measure(part).lengths
            [batches] = plan_micro_batches([lengths], self._batch_rows, self._reader.longest_row, pack=self._pack)
            yield from ([part[each].tolist() for each in bins] for bins in batches[skip:])
            skip = max(0, skip - len(batches))
