"""The numbers of a block as the `archive` encoding keeps them: rounded and ordered, but not yet coded.

Nothing here is compiled; `archive.codec`, which codes them, imports numba.

Shape legend:  p positions of a block, K kept entries, U unique draws of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.blocks import MAX_K, Context
from potstill.cache.encoding.gaps import STEP
from potstill.cache.errors import InvalidInput

BLOCK_POSITIONS = 16_384
"""Positions that are coded together; twice as many would be 2% smaller, half as many 2% larger."""
_LABEL_BOUND = 1 / 16
MOST_LABEL = 65_504 * 16
# Bits that rounding takes off a tail, by the exponent of its float16 (values from 1 to 32).
_DROPPED = {15: 1, 16: 2, 17: 3, 18: 2, 19: 1}
_INFINITE = 0x7C00


@dataclass(frozen=True, slots=True, eq=False)
class TopKCodes:
    """Top-k of a block, as in encoding `u8`."""

    ids: NDArray[np.uint32]
    """[p, K] ranks by falling logprob."""
    gaps: NDArray[np.uint8]
    """[p, K-1] gap codes (`encoding.gaps`)."""
    log_tail: NDArray[np.float16]
    """[p] log of the tail mass."""
    label_logprob: NDArray[np.float16]
    """[p] NaN where there is no label, or where it is the entry `label_entry`."""
    label_entry: NDArray[np.int16]
    """[p] index of the entry whose logprob is the label's too, -1 for none."""


@dataclass(frozen=True, slots=True, eq=False)
class DrawCodes:
    """Draws of a block: at each position by falling count, then by rising rank."""

    lengths: NDArray[np.uint16]
    """[p] number of unique draws of each position."""
    ids: NDArray[np.uint32]
    """[U] ranks."""
    counts: NDArray[np.uint16]
    """[U] number of times each was drawn."""


def canonical(codes: TopKCodes, context: Context) -> TopKCodes:
    """Round and order `codes` to what `unpack_top_k` will return.

    Ids rise where gaps are 0, tails are rounded, and a label becomes the index of its entry where the entry's logprob
    is near enough, or where `codes.label_entry` says so already.

    Raises:
        InvalidInput: a tail is NaN or positive, or a label positive.
    """
    log_tail = tail_values()[tail_indices(codes.log_tail)]
    ids = _in_order(codes)
    entry = entries_of_labels(ids, context)
    near = _near_entry(replace(codes, log_tail=log_tail), entry)
    by_entry = (entry >= 0) & ((codes.label_entry >= 0) | near)
    steps = label_steps(np.where(by_entry, np.float16(np.nan), codes.label_logprob).astype(np.float16))
    return TopKCodes(
        ids=ids,
        gaps=codes.gaps,
        log_tail=log_tail,
        label_logprob=label_values(steps),
        label_entry=np.where(by_entry, entry, -1).astype(np.int16),
    )


def canonical_draws(codes: DrawCodes) -> DrawCodes:
    """Order draws at each position by falling count, then by rising rank."""
    position = np.repeat(np.arange(len(codes.lengths)), codes.lengths)
    order = np.lexsort((codes.ids, -codes.counts.astype(np.int64), position))
    return replace(codes, ids=codes.ids[order], counts=codes.counts[order])


def _in_order(codes: TopKCodes) -> NDArray[np.uint32]:
    """Ids [p, K], rising where the gap is zero: entries that are equal in `u8` have no order to keep."""
    positions, k = codes.ids.shape
    group = np.zeros((positions, k), dtype=np.uint64)
    np.cumsum(codes.gaps > 0, axis=1, out=group[:, 1:])
    keys = group << np.uint64(32) | codes.ids
    keys.sort(axis=1)
    return keys.astype(np.uint32)


def entries_of_labels(ids: NDArray[np.uint32], context: Context) -> NDArray[np.int64]:
    """Index [p] of the entry that is the label, -1 where none is."""
    found = ids == context.labels[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1), -1)


def _near_entry(codes: TopKCodes, entry: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask [p] of labels whose logprob is within the bound of their entry's decoded one."""
    depth = np.zeros(codes.ids.shape, dtype=np.int64)
    np.cumsum(codes.gaps, axis=1, out=depth[:, 1:])
    label = codes.label_logprob.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.log(-np.expm1(np.minimum(codes.log_tail.astype(np.float64), 0.0)))
        top = kept - np.log(np.exp(-STEP * depth).sum(axis=1))
        decoded = top - STEP * np.take_along_axis(depth, np.maximum(entry, 0)[:, None], axis=1)[:, 0]
        # A float16 label is itself off by up to one part in 2048.
        near: NDArray[np.bool_] = np.abs(label - decoded) <= _LABEL_BOUND + np.abs(label) / 2048 + 0.001
    return near


@cache
def _tail_grid() -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """Index of every float16 bit pattern from 0 to infinity, without sign, and the rounded value of every index."""
    pattern = np.arange(_INFINITE + 1)
    rounded = pattern.copy()
    for exponent, bits in _DROPPED.items():
        here = pattern >> 10 == exponent
        rounded[here] = (pattern[here] + (1 << bits >> 1)) >> bits << bits
    patterns, index = np.unique(rounded, return_inverse=True)
    return index.astype(np.int32), -patterns.astype(np.uint16).view(np.float16)


def tail_indices(log_tail: NDArray[np.float16]) -> NDArray[np.int32]:
    """Index [p] of each tail in `tail_values`, after rounding."""
    if not (log_tail <= 0).all():
        wrong = log_tail[~(log_tail <= 0)][0]
        raise InvalidInput(f"a log tail is {wrong}; logarithms of a mass are zero or below")
    indices: NDArray[np.int32] = _tail_grid()[0][log_tail.view(np.uint16) & np.uint16(0x7FFF)]
    return indices


def tail_values() -> NDArray[np.float16]:
    """Values that a rounded tail can have, in falling order."""
    return _tail_grid()[1]


def label_steps(label_logprob: NDArray[np.float16]) -> NDArray[np.int64]:
    """Labels [p] in steps of 1/16 nat below zero; -1 for NaN, -2 for -inf."""
    if (label_logprob > 0).any():
        raise InvalidInput(f"a label's logprob is {label_logprob[label_logprob > 0][0]}; it must be zero or below")
    known = np.isfinite(label_logprob)
    steps = np.rint(np.where(known, -label_logprob.astype(np.float64), 0.0) / STEP).astype(np.int64)
    return np.where(known, steps, np.where(np.isnan(label_logprob), -1, -2))


def label_values(steps: NDArray[np.int64]) -> NDArray[np.float16]:
    """Logprobs [p], float16, of the steps that `label_steps` gives."""
    values = (-STEP * steps).astype(np.float16)
    return np.where(steps >= 0, values, np.where(steps == -1, np.nan, -np.inf)).astype(np.float16)


def check_ranks(ids: NDArray[np.uint32], vocab_size: int, k: int) -> None:
    """Raise `InvalidInput` for ids [p, K] that no block can hold."""
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"archive keeps 1 to {MAX_K} entries of a position, not {k}")
    if int(ids.max(initial=0)) >= vocab_size:
        raise InvalidInput(f"a rank is {int(ids.max())}, the vocabulary has {vocab_size}")
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise InvalidInput("a position has the same id twice; archive keeps each once")


def check_draws(codes: DrawCodes, draws: int, vocab_size: int) -> None:
    """Raise `InvalidInput` for draws that no block can hold."""
    if not 1 <= draws <= MAX_K:
        raise InvalidInput(f"archive keeps 1 to {MAX_K} draws of a position, not {draws}")
    if int(codes.ids.max(initial=0)) >= vocab_size:
        raise InvalidInput(f"a rank is {int(codes.ids.max())}, the vocabulary has {vocab_size}")
    position = np.repeat(np.arange(len(codes.lengths)), codes.lengths)
    sums = np.bincount(position, weights=codes.counts, minlength=len(codes.lengths))
    if (sums != draws).any() or (codes.counts == 0).any():
        raise InvalidInput(f"counts of a position must be positive and sum to {draws}, its draws")
    keys = np.sort(position << 32 | codes.ids.astype(np.int64))
    if (keys[1:] == keys[:-1]).any():
        raise InvalidInput("a position has the same id twice among its draws; its counts must be added up")
