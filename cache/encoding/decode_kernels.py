"""Compiled loops for decoding, which pass over the codes once where numpy passes five times.

Each writes into its last argument, and gives the same bits as the numpy code that is used for few entries.

Shape legend:  P positions, K kept entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.compiled import compiled


@compiled
def sum_weights(gaps: NDArray[np.uint8], weights: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
    """Sum [P] over the entries of `weights[s]`, s being the sum of the gaps [P, K-1] before an entry."""
    for position in range(gaps.shape[0]):
        step = 0
        total = weights[0]
        for gap in range(gaps.shape[1]):
            step += gaps[position, gap]
            total += weights[step]
        sums[position] = total


@compiled
def fall_by(gaps: NDArray[np.uint8], width: float, top: NDArray[np.float64], logprobs: NDArray[np.float32]) -> None:
    """Logprobs [P, K]: the first is `top` [P], each next one is lower by its gap times `width`."""
    for position in range(gaps.shape[0]):
        step = 0
        logprobs[position, 0] = top[position]
        for gap in range(gaps.shape[1]):
            step += gaps[position, gap]
            logprobs[position, gap + 1] = top[position] - width * step


@compiled
def gather(table: NDArray[np.uint32], codes: NDArray[np.generic], values: NDArray[np.uint32]) -> None:
    """Look up `table[codes]`, [P, K]; the codes must have been checked to be inside."""
    for position in range(codes.shape[0]):
        for entry in range(codes.shape[1]):
            values[position, entry] = table[codes[position, entry]]
