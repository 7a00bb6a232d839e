"""Exact draws with replacement from full distributions: the reference that every capture path is held to.

A row's draws depend only on the seed, the row and its logprobs: a row that is scored twice gives the same draws,
whatever the batch and the time. Float noise in logprobs moves a draw to another id only at the edge between two ids.

Shape legend:  T tokens of one row, V vocabulary size, N draws.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import LimitExceeded, TeacherFailed
from potstill.cache.types import Draws

MAX_DRAWS = 2**16 - 1
"""Most draws at a position: a count can be N, and is kept as uint16."""

# A distribution in float32 sums to 1 within about 1e-5; more means a broken teacher.
_MASS_TOLERANCE = 1e-3


def draw_rows(logprobs: NDArray[np.floating], n: int, seed: int, row_key: bytes) -> Draws:
    """Draw `n` ids with replacement at each position of one row.

    Inverse-CDF sampling on a float64 cumulative sum; an id without mass is never drawn.

    Args:
        logprobs: [T, V] nats over the full vocabulary.
        n: draws a position.
        seed: the target set's seed, in [0, 2**63).
        row_key: key of the row, so that rows have different draws.

    Raises:
        LimitExceeded: `n` is over 65,535 or below 1.
        TeacherFailed: the logprobs are no distribution.
    """
    check_num_draws(n)
    drawn = np.empty((len(logprobs), n), np.intp)
    for position, at in enumerate(zip(logprobs, uniforms(len(logprobs), n, seed, row_key), strict=True)):
        drawn[position] = _draw(*at)
    drawn.sort(axis=1)
    is_first = np.ones(drawn.shape, np.bool_)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    offsets = np.zeros(len(drawn) + 1, np.int64)
    np.cumsum(is_first.sum(axis=1), out=offsets[1:])
    counts = np.diff(np.flatnonzero(is_first), append=drawn.size)
    return Draws(offsets, drawn[is_first].astype(np.uint32), counts.astype(np.uint16))


def uniforms(num_positions: int, n: int, seed: int, row_key: bytes, *, start: int = 0) -> NDArray[np.float64]:
    """Random numbers [T, N] in [0, 1) with 53 bits, from Philox keyed by a hash of `seed` and `row_key`.

    They are those of the T positions from `start` on, so that a row can be worked on in parts.
    """
    # From the bit generator itself: numpy fixes its stream for ever, but not that of `Generator.random`.
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + row_key, digest_size=16, person=b"potstill draws").digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    skipped = start * n
    generator.advance(skipped // 4)  # the counter moves by blocks of four numbers
    raw = generator.random_raw(skipped % 4 + num_positions * n)[skipped % 4 :]
    return (raw >> np.uint64(11)).astype(np.float64).reshape(num_positions, n) * 2.0**-53


def check_num_draws(n: int) -> None:
    """Refuse a number of draws that cannot be kept.

    Raises:
        LimitExceeded: `n` is over 65,535 or below 1.
    """
    if not 1 <= n <= MAX_DRAWS:
        raise LimitExceeded(f"{n} draws a position were asked for; it must be 1 to {MAX_DRAWS}")


def _draw(logprobs: NDArray[np.floating], uniform: NDArray[np.float64]) -> NDArray[np.intp]:
    cumulative = np.cumsum(np.exp(logprobs.astype(np.float64)))
    mass = cumulative[-1]
    if not abs(mass - 1.0) <= _MASS_TOLERANCE:
        raise TeacherFailed(f"the teacher's distribution sums to {mass:.6g}, not to 1; nothing is drawn from it")
    # A product that rounds up to the whole mass would land behind the last id.
    drawn: NDArray[np.intp] = np.searchsorted(
        cumulative, np.minimum(uniform * mass, np.nextafter(mass, 0.0)), side="right"
    )
    return drawn
