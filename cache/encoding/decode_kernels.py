"""Compiled loops of decoding: one pass over the codes where numpy makes five.

Each writes into its last argument, and gives the bits of the numpy code beside which it is called.

Shape legend:  P positions, K kept entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.compiled import compiled


@compiled
def sum_weights(gaps: NDArray[np.uint8], weights: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
    """[P]: over the entries, the weight of the sum of the [P, K-1] gaps before each."""
    for position in range(gaps.shape[0]):
        step = 0
        total = weights[0]
        for gap in range(gaps.shape[1]):
            step += gaps[position, gap]
            total += weights[step]
        sums[position] = total


@compiled
def fall_by(gaps: NDArray[np.uint8], width: float, top: NDArray[np.float64], logprobs: NDArray[np.float32]) -> None:
    """[P, K]: the first entry is the top [P], each next one a gap of so many widths lower."""
    for position in range(gaps.shape[0]):
        step = 0
        logprobs[position, 0] = top[position]
        for gap in range(gaps.shape[1]):
            step += gaps[position, gap]
            logprobs[position, gap + 1] = top[position] - width * step


@compiled
def gather(table: NDArray[np.uint32], codes: NDArray[np.generic], values: NDArray[np.uint32]) -> None:
    """[P, K]: `table[codes]`. Codes were checked to be inside."""
    for position in range(codes.shape[0]):
        for entry in range(codes.shape[1]):
            values[position, entry] = table[codes[position, entry]]
