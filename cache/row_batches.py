"""Batches of consecutive rows by a budget of tokens or bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def row_batches(starts: NDArray[np.int64], budget: int, *, max_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut rows into batches (start, stop) of as many rows as the budget holds; a longer row is a batch of its own.

    Args:
        starts: [R+1] start of each row on an axis without holes, then the end (see `row_starts`).
        budget: most of a batch, in the unit of `starts`.
        max_rows: most rows of a batch; None for any number.
    """
    row, num_rows = 0, len(starts) - 1
    while row < num_rows:
        fitting = int(np.searchsorted(starts, starts[row] + budget, side="right")) - 1
        stop = max(fitting, row + 1)
        if max_rows is not None:
            stop = min(stop, row + max_rows)
        yield row, stop
        row = stop


def row_starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Start [R+1] of each of R rows that lie one after the other, then the end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
