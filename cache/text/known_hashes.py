"""A set of 64-bit hashes that grows, of 8 bytes each.

Shape legend:  N hashes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class KnownHashes:
    """Hashes in sorted runs, of which each is over twice as long as the next; adding joins those that are not."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def has(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which of hashes [N] are known, [N]."""
        found = np.zeros(len(hashes), np.bool_)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[places] == hashes
        return found

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Add hashes [N], of which none is known."""
        run = np.unique(hashes)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)
