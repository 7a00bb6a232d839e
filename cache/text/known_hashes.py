"""A map that grows, from 64-bit hashes to numbers below 2**32, of 12 bytes each.

Shape legend:  N hashes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NONE = -1
"""In place of the number of a hash that is not known."""


class KnownHashes:
    """Hashes in sorted runs, of which each is over twice as long as the next; adding joins those that are not."""

    def __init__(self) -> None:
        self._runs: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]] = []

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._runs)

    def numbers(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Look up hashes [N]: the number of each, [N], `NONE` where it is not known."""
        found = np.full(len(hashes), NONE, np.int64)
        for known, numbers in self._runs:
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found = np.where(known[places] == hashes, numbers[places], found)
        return found

    def add(self, hashes: NDArray[np.uint64], numbers: NDArray[np.uint32]) -> None:
        """Add hashes [N], all different and none known, with their numbers [N]."""
        run = _sorted(hashes, numbers)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            before = self._runs.pop()
            run = _sorted(np.concatenate([before[0], run[0]]), np.concatenate([before[1], run[1]]))
        if len(run[0]):
            self._runs.append(run)


def _sorted(hashes: NDArray[np.uint64], numbers: NDArray[np.uint32]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    order = np.argsort(hashes, kind="stable")
    return hashes[order], numbers[order]
