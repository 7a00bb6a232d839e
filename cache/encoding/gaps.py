"""The gap codes of `u8`: the difference between neighbouring logprobs, in sixteenths of a nat.

Shape legend:  P positions, K kept entries.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

STEP = 1 / 16
"""Width of a gap code, in nats."""
SATURATED = 255
# More steps than codes of MAX_K entries can reach; fits into int32.
_UNREACHABLE = 2.0**30
BLOCK_ENTRIES = 1 << 16
"""Entries that are decoded together: their float64 stays in a core's L2 cache."""
COMPILED_ENTRIES = 1 << 19
"""Least number of entries for which compiled code is loaded: it takes a few such reads to pay for itself."""
LOADED_ENTRIES = 1 << 14
"""Least number of entries for which compiled code is called once it is loaded."""
_KERNELS = "potstill.cache.encoding.decode_kernels"
# Weights are whole numbers, so that any order of summing gives the same bits; the sum of 2^18 fits into int64.
_ONE = 2.0**44
_Number = TypeVar("_Number", np.int32, np.float64)


def encode_gaps(logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode falling logprobs [P, K] as gaps [P, K-1]; after a gap that saturates, the next ones make up for it."""
    with np.errstate(invalid="ignore"):
        steps = logprobs[:, :1].astype(np.float64) - logprobs
    # Distances to the top are rounded, not gaps, so that errors of rounding do not add up along a row.
    np.rint(np.multiply(steps, 1 / STEP, out=steps), out=steps)
    if not np.isfinite(steps).all():
        np.nan_to_num(steps, copy=False, nan=0.0, posinf=_UNREACHABLE)
    positions = np.minimum(steps, _UNREACHABLE, out=steps).astype(np.int32)
    gaps = np.diff(positions, axis=1)
    rows = (gaps > SATURATED).any(axis=1)
    if rows.any():
        gaps[rows] = np.diff(_reached(positions[rows], SATURATED), axis=1)
    return gaps.astype(np.uint8)


def beyond_codes(logprobs: NDArray[np.float64]) -> NDArray[np.bool_] | None:
    """Mask [P, K] of the entries too far below the top one for saturated gaps to reach; None when there are none."""
    with np.errstate(invalid="ignore"):
        drop = logprobs[:, :1] - logprobs
        # Negated, so that it also holds for the NaN between two entries without mass.
        wide = ~(np.diff(drop, axis=1) <= SATURATED * STEP)
    if not wide.any():
        return None
    # A gap over the widest code starts a saturated run; entries stay lost until the codes have caught up.
    rows = wide.any(axis=1)
    far = np.nan_to_num(drop[rows], nan=np.inf, posinf=np.inf)
    far[:, 0] = 0.0
    lost = np.zeros(drop.shape, dtype=bool)
    lost[rows] = far - _reached(far, SATURATED * STEP) > STEP
    return lost


def decode_gaps(gaps: NDArray[np.uint8], kept: NDArray[np.float64]) -> NDArray[np.float32]:
    """Decode gaps [P, K-1] to logprobs [P, K], scaled so that their probabilities sum to exp(`kept`), [P].

    Batching does not change a bit, and neither does the choice between compiled code and numpy.
    """
    if is_compiled_faster(len(gaps) * (gaps.shape[1] + 1)):
        return _decode_compiled(gaps, kept)
    logprobs = np.empty((gaps.shape[0], gaps.shape[1] + 1), np.float32)
    block = max(BLOCK_ENTRIES // logprobs.shape[1], 1)
    for start in range(0, len(gaps), block):
        part = slice(start, start + block)
        logprobs[part] = _decode_block(gaps[part], kept[part])
    return logprobs


def is_compiled_faster(num_entries: int) -> bool:
    """Tell whether compiled code decodes so many entries faster, with the time that it takes to be loaded."""
    return num_entries >= (LOADED_ENTRIES if _KERNELS in sys.modules else COMPILED_ENTRIES)


def load_compiled() -> None:
    """Load the compiled code, half a second, so that small reads are decoded by it, too: for who makes many."""
    importlib.import_module(_KERNELS)


def log1mexp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012, "Accurately computing log(1-exp)")."""
    with np.errstate(divide="ignore"):
        return np.where(x > -np.log(2.0), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _decode_compiled(gaps: NDArray[np.uint8], kept: NDArray[np.float64]) -> NDArray[np.float32]:
    from potstill.cache.encoding.decode_kernels import fall_by, sum_weights  # noqa: PLC0415 -- numba takes half a second to import

    gaps = np.ascontiguousarray(gaps)
    sums = np.empty(len(gaps), np.int64)
    sum_weights(gaps, _weights(gaps.shape[1]), sums)
    logprobs = np.empty((gaps.shape[0], gaps.shape[1] + 1), np.float32)
    fall_by(gaps, STEP, _top(kept, sums), logprobs)
    return logprobs


def _decode_block(gaps: NDArray[np.uint8], kept: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = np.zeros((gaps.shape[0], gaps.shape[1] + 1), np.int32)
    np.cumsum(gaps, axis=1, dtype=np.int32, out=steps[:, 1:])
    sums = np.take(_weights(gaps.shape[1]), steps, mode="clip").sum(axis=1)
    return _top(kept, sums)[:, None] - STEP * steps


def _top(kept: NDArray[np.float64], sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logprobs [P] of the first entries."""
    top: NDArray[np.float64] = kept - np.log(sums / _ONE)
    return top


@lru_cache(maxsize=8)
def _weights(num_gaps: int) -> NDArray[np.int64]:
    """Table of exp(-i/16) in units of 1 / `_ONE`, for every sum i of so many codes; faster than an exp per entry."""
    weights: NDArray[np.int64] = np.rint(_ONE * np.exp(-STEP * np.arange(SATURATED * num_gaps + 1))).astype(np.int64)
    return weights


def _reached(drops: NDArray[_Number], most: float) -> NDArray[_Number]:
    """Distances below the top entry that gaps of at most `most` can express, for the distances `drops`.

    Unrolls r[j] = min(d[j], r[j-1] + most), r[0] = d[0] = 0, to most * j + min(d[i] - most * i for i <= j).
    """
    slack = (most * np.arange(drops.shape[1])).astype(drops.dtype)
    return np.minimum.accumulate(drops - slack, axis=1) + slack
