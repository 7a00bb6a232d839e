"""The rows that a student is evaluated on and never trained on: drawn by a hash of `held_out_seed` alone.

Shape legend:  R rows of the corpus, H held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.keys import KEY_BYTES
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.student_trainer.data.order import hashed

_KEYS_AT_ONCE = 1 << 20
_HELD_OUT = np.uint64(3)
"""The salt of these draws; the order of rows has others."""


def choose_held_out(num_rows: int, held_out: float, seed: int) -> NDArray[np.int64]:
    """Draw the held-out rows, [H] indexes, rising. `held_out` is a count, or a share below 1 (at least one row).

    Raises:
        InvalidInput: no row would be left to train on.
    """
    count = int(held_out) if held_out >= 1 or held_out == 0 else max(1, round(held_out * num_rows))
    if count >= num_rows:
        raise InvalidInput(
            f"data.held_out is {held_out!r}, {counted(count, 'row')}, of a corpus of {num_rows:,}; "
            "leave some to train on"
        )
    if 2 * count > num_rows:  # draw the smaller side
        rest = _distinct(num_rows, num_rows - count, seed)
        return np.setdiff1d(np.arange(num_rows, dtype=np.int64), rest, assume_unique=True)
    return _distinct(num_rows, count, seed)


def with_copies(corpus: Corpus, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add every other row with the same tokens to the given rows; none of the result, rising, may be trained on.

    Where the corpus has repeated rows, their keys are read twice from end to end, 16 bytes a row.
    """
    if corpus.spec.duplicate_rows == 0 or not len(rows):
        return rows
    wanted = np.concatenate([keys[rows[(rows >= a) & (rows < a + len(keys))] - a] for a, keys in _keys(corpus)])
    return np.concatenate([a + np.flatnonzero(np.isin(keys, wanted)) for a, keys in _keys(corpus)])


def _keys(corpus: Corpus) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
    """Read all row keys in blocks: the first row of a block, and the block's keys."""
    for start in range(0, len(corpus), _KEYS_AT_ONCE):
        block = corpus.row_keys(start, min(start + _KEYS_AT_ONCE, len(corpus)))
        yield start, np.ascontiguousarray(block).reshape(-1).view(f"S{KEY_BYTES}")


def _distinct(num_rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """[count] distinct rows, rising: the first ones of a hashed sequence, so memory follows the count."""
    num_draws = 2 * count + 16
    while True:
        draws = hashed(np.arange(num_draws, dtype=np.int64), seed, _HELD_OUT) % np.uint64(num_rows)
        rows, first = np.unique(draws.astype(np.int64), return_index=True)
        if len(rows) >= count:
            return np.sort(rows[np.argsort(first)[:count]])
        num_draws *= 2
