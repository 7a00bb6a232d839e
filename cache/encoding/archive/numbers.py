"""Coding of gaps, tails, labels and counts with adaptive tables; compiled.

The gaps of a sorted softmax are close to independent, each column with its own distribution (as the spacings of
exponential variables are, Renyi 1953), so each column has a table and nothing else is looked at. A tail is coded as
the difference from the mean of tails with a similar last entry.

Shape legend:  p positions, K kept entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.range_coder import (
    FAILED,
    SIGNED_SYMBOLS,
    Coder,
    bit_length,
    code_signed,
    code_symbol,
    compiled,
    tables,
)

# Gaps below the last of these have a symbol in their column's table; larger ones are rare and share a second table.
_NARROW = 32
_WIDE = 256 - _NARROW + 1
_LEVELS = 64
_MOST_DEPTH = 511
_MOST, _LEFT = 25, 32
NO_LABEL, LABEL_IS_ENTRY, LABEL_APART, LABEL_WITHOUT_MASS = 0, 1, 2, 3


class Numbers(NamedTuple):
    """Numbers of a block beside its ids."""

    gaps: NDArray[np.uint8]
    """[p, K-1] gap codes (`encoding.gaps`)."""
    tails: NDArray[np.int32]
    """[p] indices into `codes.tail_values`, rising as the tail falls."""
    label_kinds: NDArray[np.uint8]
    """[p] `NO_LABEL`, `LABEL_IS_ENTRY`, `LABEL_APART` or `LABEL_WITHOUT_MASS`."""
    labels: NDArray[np.int32]
    """[p] steps of 1/16 nat below zero for `LABEL_APART`, else 0."""


class NumberModel(NamedTuple):
    """Tables and means that are learned while numbers are coded."""

    narrow: NDArray[np.int32]
    wide: NDArray[np.int32]
    tail_lengths: NDArray[np.int32]
    tail_means: NDArray[np.int64]
    """[levels] running means, in 1/256."""
    label_lengths: NDArray[np.int32]
    label_means: NDArray[np.int64]
    label_kinds: NDArray[np.int32]
    weights: NDArray[np.int64]
    """[depth] exp(-depth / 16) in 2**-32."""


def new_number_model(k: int) -> NumberModel:
    """Make a model that has learned nothing."""
    return NumberModel(
        narrow=tables(max(k - 1, 1), _NARROW),
        wide=tables(2, _WIDE),
        tail_lengths=tables(_LEVELS, SIGNED_SYMBOLS),
        tail_means=np.full(_LEVELS, 1000 << 8, dtype=np.int64),
        label_lengths=tables(_LEVELS, SIGNED_SYMBOLS),
        label_means=np.full(_LEVELS, 100 << 8, dtype=np.int64),
        label_kinds=tables(4, 4),
        weights=_weights(),
    )


def _weights() -> NDArray[np.int64]:
    """Table of exp(-depth / 16) in 2**-32, computed in integers: floating-point exp differs between machines."""
    # exp(-1/16) * 2**62, rounded.
    factor = 4332278087304955805
    weight, weights = 1 << 62, []
    for _ in range(_MOST_DEPTH + 1):
        weights.append(weight >> 30)
        weight = weight * factor >> 62
    return np.array(weights, dtype=np.int64)


@compiled
def code_gaps(coder: Coder, numbers: Numbers, model: NumberModel) -> None:
    """Code the gaps [p, K-1]."""
    gaps = numbers.gaps
    for position in range(gaps.shape[0]):
        for column in range(gaps.shape[1]):
            gap = np.int64(gaps[position, column])
            narrow = code_symbol(coder, model.narrow[column], min(gap, _NARROW - 1))
            if narrow == _NARROW - 1:
                table = model.wide[0 if column == 0 else 1]
                narrow += code_symbol(coder, table, max(gap - narrow, 0))
            gaps[position, column] = narrow
        if coder.state[FAILED]:
            return


@compiled
def code_tails(coder: Coder, numbers: Numbers, model: NumberModel, most: int) -> None:
    """Code the tails [p], each at most `most`."""
    for position in range(len(numbers.tails)):
        level = _last_level(numbers, model, position)
        value = _code_near(
            coder, model.tail_lengths[level], model.tail_means, level, np.int64(numbers.tails[position]), most
        )
        numbers.tails[position] = value
        if coder.state[FAILED]:
            return


@compiled
def code_labels(coder: Coder, numbers: Numbers, model: NumberModel, contexts: NDArray[np.uint8], most: int) -> None:
    """Code the kind of each label [p], given what its ids tell (`contexts`), and the labels apart, at most `most`."""
    for position in range(len(contexts)):
        kind = code_symbol(coder, model.label_kinds[contexts[position]], np.int64(numbers.label_kinds[position]))
        numbers.label_kinds[position] = kind
        if kind == LABEL_APART:
            level = _last_level(numbers, model, position)
            numbers.labels[position] = _code_near(
                coder, model.label_lengths[level], model.label_means, level, np.int64(numbers.labels[position]), most
            )
        if coder.state[FAILED]:
            return


@compiled
def _last_level(numbers: Numbers, model: NumberModel, position: int) -> int:
    """Ratio of the top-k's mass to its last entry, on a scale of half powers of 2."""
    depth = np.int64(0)
    total = model.weights[0]
    for column in range(numbers.gaps.shape[1]):
        depth = min(depth + numbers.gaps[position, column], _MOST_DEPTH)
        total += model.weights[depth]
    ratio = (total << 2) // max(model.weights[depth], 1)
    length = bit_length(ratio)
    half = (ratio >> (length - 2)) & 1
    return min(2 * length + half - 6, _LEVELS - 1)


@compiled
def _code_near(
    coder: Coder, lengths: NDArray[np.int32], means: NDArray[np.int64], level: int, value: int, most: int
) -> int:
    mean = means[level] >> 8
    value = mean + code_signed(coder, lengths, value - mean)
    if value < 0 or value > most:
        coder.state[FAILED] = 1
        value = 0
    means[level] += (value << 8) // 32 - means[level] // 32
    return value


class CountModel(NamedTuple):
    """Tables that are learned while counts are coded."""

    narrow: NDArray[np.int32]
    """Tables by the largest value that the count can have, and by the number of draws that are left."""
    lengths: NDArray[np.int32]


def new_count_model() -> CountModel:
    """Make a model that has learned nothing."""
    return CountModel(tables(_MOST * _LEFT, _NARROW), tables(1, SIGNED_SYMBOLS))


@compiled
def code_counts(
    coder: Coder, lengths: NDArray[np.uint16], counts: NDArray[np.uint16], model: CountModel, draws: int
) -> int:
    """Code falling counts that sum to `draws` at each position; returns how many there are.

    `counts` has room for `draws` at each position.
    """
    used = 0
    for position in range(len(lengths)):
        left, most, first = draws, draws, used
        while left > 0:
            most = min(most, left)
            count = 1
            if most > 1:
                count = _code_count(coder, model, np.int64(counts[used]), most, left)
            counts[used] = count
            used += 1
            left -= count
            most = count
        lengths[position] = used - first
        if coder.state[FAILED]:
            break
    return used


@compiled
def _code_count(coder: Coder, model: CountModel, count: int, most: int, left: int) -> int:
    place = left if left < 16 else min(16 + (left - 16) // 4, _LEFT - 1)
    row = min(most, _MOST - 1) * _LEFT + place
    narrow = code_symbol(coder, model.narrow[row], min(count, _NARROW) - 1)
    if narrow == _NARROW - 1:
        narrow += code_signed(coder, model.lengths[0], count - _NARROW)
    count = narrow + 1
    if count < 1 or count > most:
        coder.state[FAILED] = 1
        count = 1
    return count
