"""The order of rows from one or more corpora: which corpus each row of the run comes from, and which row of it.

Row n of the run comes from the corpus whose share of [0, 1) holds the fractional part of n times the golden ratio: any
stretch of rows has each corpus in its share but for a few rows, unlike independent draws. The shares are the
weights at the row's step. Each corpus is gone through in its own epochs. All is a pure function of the row's number,
so it is the same for any number of workers and after a resume.

Shape legend:  M corpora, N rows of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from potstill.student_trainer.data.order import SampleOrder, hashed
from potstill.student_trainer.data.settings import Points, weights_at

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / the golden ratio: its multiples, taken modulo 2^64, are spread most evenly (Weyl's sequence)."""
_START = np.uint64(4)
"""The salt of the sequence's start."""
_BLOCK_ROWS = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class MixtureOrder:
    """The endless sequence of training rows, as rows of all corpora end to end."""

    orders: tuple[SampleOrder, ...]
    """[M] the order within each corpus."""
    first_rows: NDArray[np.int64]
    """[M+1] rows at which each corpus begins, and all rows."""
    weights: tuple[Points, ...]
    """[M] relative weights over the steps."""
    batch_rows: int
    """Rows of a step."""
    seed: int
    skipped: tuple[int, ...] = ()
    """Batches of `batch_rows` that no step has, by their number from 0 (`potstill.student_trainer.train.rollback`)."""
    _counts: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)
    """Rows [M] of each corpus before each block of `_BLOCK_ROWS` rows of the run, for the first blocks."""

    def take(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Give [count] rows of all corpora from the global cursor on."""
        if len(self.orders) == 1:
            return self.orders[0].take(cursor, count)
        corpus_of, before = self.corpus_of(cursor, count), self.counts(cursor)
        rows = np.empty(count, dtype=np.int64)
        for m, order in enumerate(self.orders):
            here = np.flatnonzero(corpus_of == m)
            rows[here] = self.first_rows[m] + order.take(int(before[m]), len(here))
        return rows

    def batch(self, step: int) -> int:
        """Number the batch that is the step after `step` steps."""
        for skipped in sorted(self.skipped):
            step += skipped <= step
        return step

    def cursor(self, step: int) -> int:
        """Number the row at which the step after `step` steps begins."""
        return self.batch(step) * self.batch_rows

    def rank_slice(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The rows of step `step` that fall to `rank`: a contiguous, nearly equal part."""
        start, stop = self.batch_rows * rank // world_size, self.batch_rows * (rank + 1) // world_size
        return self.take(self.cursor(step) + start, stop - start)

    def windows(self, cursor: int) -> list[tuple[int, int]]:
        """[M] the window (`SampleOrder.window_number`) of the next row from each corpus, at `cursor`."""
        return [order.window_number(int(n)) for order, n in zip(self.orders, self.counts(cursor), strict=True)]

    def first_rows_of(self, windows: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """List the first row of each shard of one window of each corpus."""
        rows = [
            first + order.shard_rows[order.shards_of(*window)]
            for order, first, window in zip(self.orders, self.first_rows[:-1], windows, strict=True)
        ]
        return np.concatenate(rows)

    def epochs(self, cursor: int) -> list[int]:
        """[M] the epoch of the next row from each corpus, at `cursor`."""
        return [order.epoch(int(n)) for order, n in zip(self.orders, self.counts(cursor), strict=True)]

    def corpus_of(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Name the corpus, 0 to M - 1, of each of [count] rows of the run from the cursor on."""
        start = hashed(np.zeros(1, dtype=np.int64), self.seed, _START)
        places = np.arange(cursor, cursor + count, dtype=np.uint64) * _GOLDEN + start
        # 53 bits are as many as a float has, so that comparing is exact on every machine.
        fractions = (places >> np.uint64(11)).astype(np.float64) / 2.0**53
        first, last = cursor // self.batch_rows, (cursor + count) // self.batch_rows
        bounds = self._bounds(np.arange(first, last + 1))
        if (bounds == bounds[0]).all():
            return np.searchsorted(bounds[0], fractions, side="right")
        steps = np.arange(cursor, cursor + count) // self.batch_rows - first
        above: NDArray[np.int64] = np.count_nonzero(fractions[:, None] >= bounds[steps], axis=1).astype(np.int64)
        return above

    def counts(self, cursor: int) -> NDArray[np.int64]:
        """Count the rows [M] that come from each corpus before the cursor."""
        if len(self.orders) == 1:
            return np.array([cursor], dtype=np.int64)
        block, nothing = cursor // _BLOCK_ROWS, np.zeros(len(self.orders), dtype=np.int64)
        for passed in range(len(self._counts), block + 1):  # two threads may both do it, and find the same
            before = self._counts[passed - 1] + self._in_stretch((passed - 1) * _BLOCK_ROWS) if passed else nothing
            self._counts[passed] = before
        return self._counts[block] + self._in_stretch(block * _BLOCK_ROWS, cursor - block * _BLOCK_ROWS)

    def _in_stretch(self, cursor: int, count: int = _BLOCK_ROWS) -> NDArray[np.int64]:
        return np.bincount(self.corpus_of(cursor, count), minlength=len(self.orders))

    def _bounds(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Upper ends [steps, M - 1] of the corpora's shares of [0, 1); the last one's is 1."""
        weights = np.stack([weights_at(points, steps) for points in self.weights], axis=1)
        ends = np.cumsum(weights, axis=1)
        return ends[:, :-1] / ends[:, -1:]
