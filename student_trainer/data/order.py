"""The order of training rows: a pure function of (seed, epoch, the corpus's shards), whatever the number of workers.

This is the order within one corpus; `mixture` says which corpus a row of the run comes from.

An epoch shuffles the shards, then the rows within each window of consecutive shuffled shards: fully random
rows would read an object per row. Keys are a splitmix64 hash of (seed, epoch, index) sorted stably, not a
library's random stream, so an order never changes under another version of anything. A cursor counts
its rows since the start of the run, and the epoch follows from it.

Held-out rows and rows of the same tokens belong to no epoch.

Shape legend:  R rows of the corpus, S shards, L rows left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# Salts, so that the uses of one seed share no random numbers; 3 is that of held-out rows.
_SHARDS, _ROWS = np.uint64(1), np.uint64(2)
_FEW = 4
"""Windows, and plans of epochs, that are kept: of those who read ahead, who train and who evaluate."""

K = TypeVar("K")
T = TypeVar("T")


def hashed(indexes: NDArray[np.int64], *salt: int | np.uint64) -> NDArray[np.uint64]:
    """Hash every index under the salts to uint64: splitmix64 (Steele et al. 2014), chained."""
    state = np.zeros(indexes.shape, dtype=np.uint64)
    for part in (*salt, indexes.astype(np.uint64)):
        state = _mix((state ^ np.uint64(part)) + np.uint64(0x9E3779B97F4A7C15))
    return state


@dataclass(frozen=True, slots=True, eq=False)
class SampleOrder:
    """The endless sequence of training rows, one epoch after the other."""

    shard_rows: NDArray[np.int64]
    """[S+1] first row of each shard, and the number of rows."""
    left_out: NDArray[np.int64]
    """[L] rows that are never drawn, rising: those held out and their copies."""
    seed: int
    window_shards: int = 8
    _plans: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict, init=False, repr=False)
    _windows: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)
    """The last few windows that were asked for, by epoch and window; without, they are computed."""

    @property
    def rows_per_epoch(self) -> int:
        """Training rows, each once per epoch."""
        return int(self.shard_rows[-1]) - len(self.left_out)

    def epoch(self, cursor: int) -> int:
        """The epoch that the row at `cursor` belongs to."""
        return cursor // self.rows_per_epoch

    def take(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Give [count] row indexes from the global cursor on; epochs follow each other without a gap."""
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, number = self.window_number(cursor)
            passed = cursor - epoch * self.rows_per_epoch - int(self._plan(epoch)[1][number])
            part = self.window(epoch, number)[passed : passed + count]
            parts.append(part)
            cursor, count = cursor + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def window_number(self, cursor: int) -> tuple[int, int]:
        """Number the window that the row at `cursor` is in: its epoch, and its place there."""
        epoch, offset = divmod(cursor, self.rows_per_epoch)
        return epoch, int(np.searchsorted(self._plan(epoch)[1], offset, side="right")) - 1

    def shards_of(self, epoch: int, number: int) -> NDArray[np.int64]:
        """List the shards of a window; the first one of the next epoch follows the last of one."""
        shards = self._plan(epoch)[0]
        if number * self.window_shards >= len(shards):
            return self.shards_of(epoch + 1, 0)
        return shards[number * self.window_shards : (number + 1) * self.window_shards]

    def window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Give the rows of a window of shards, in their order."""
        found = self._windows.get((epoch, number))
        if found is None:
            chosen = self.shards_of(epoch, number)
            bounds = zip(self.shard_rows[chosen], self.shard_rows[chosen + 1], strict=True)
            rows = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in bounds])
            rows = rows[~np.isin(rows, self.left_out, assume_unique=True)]
            order = np.argsort(hashed(rows, self.seed, epoch, _ROWS), kind="stable")
            found = _kept(self._windows, (epoch, number), rows[order])
        return found

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shards in order [S], and where in the epoch each window of them starts."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = _kept(self._plans, epoch, self._new_plan(epoch))
        return plan

    def _new_plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        num_shards = len(self.shard_rows) - 1
        keys = hashed(np.arange(num_shards, dtype=np.int64), self.seed, epoch, _SHARDS)
        shards = np.argsort(keys, kind="stable").astype(np.int64)
        held_before = np.searchsorted(self.left_out, self.shard_rows)
        kept = (np.diff(self.shard_rows) - np.diff(held_before))[shards]
        starts = np.concatenate([[0], np.cumsum(kept)])[:: self.window_shards]
        # A window of left-out rows only is empty; searchsorted on the right skips it.
        return shards, starts.astype(np.int64)


def _kept(few: dict[K, T], key: K, made: T) -> T:
    """Keep what was made with the last few before it; threads may ask at once: each goes on with what it made."""
    few[key] = made
    for oldest in list(few)[:-_FEW]:
        few.pop(oldest, None)
    return made


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
