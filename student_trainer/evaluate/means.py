"""Means over the positions of some documents, with their standard errors.

Positions of one document are alike, so a mean over positions is a ratio of two sums over documents, and its standard
error is that of documents: x/n with the residuals x_d - (x/n) n_d, linearised (the delta method; Cochran, "Sampling
Techniques", 6.4). Documents count as drawn independently; other seeds of training are no part of the error.

Shape legend:  D documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import JSON


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean and its standard error."""

    value: float
    stderr: float | None
    """None where there is one document only, which tells nothing about others."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object; an infinite value, as of a perplexity, is null there."""
        return {name: each if each is not None and math.isfinite(each) else None for name, each in self._named()}

    def transformed(self, function: Callable[[float], float], slope: Callable[[float], float]) -> Measure:
        """Make the measure of a smooth function of this one, by its derivative."""
        error = None if self.stderr is None else abs(slope(self.value)) * self.stderr
        return Measure(function(self.value), error)

    def _named(self) -> tuple[tuple[str, float | None], ...]:
        return ("value", self.value), ("stderr", self.stderr)


def ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> Measure | None:
    """Divide the sum over documents by that of their counts; None where the counts are all 0.

    Args:
        sums: [D] of each document.
        counts: [D] of its positions, or bytes.
    """
    total = float(counts.sum())
    if total == 0.0:
        return None
    mean = float(sums.sum()) / total
    counted = int(np.count_nonzero(counts))
    if counted < 2:
        return Measure(mean, None)
    spread = float(((sums - mean * counts) ** 2).sum())
    return Measure(mean, math.sqrt(counted / (counted - 1) * spread) / total)


def perplexity(loss: Measure) -> Measure:
    """Make the perplexity of a mean loss in nats; infinite over 709 nats, as float64 has no more."""
    return loss.transformed(_exp, _exp)


def jackknife(value: float, without_each: NDArray[np.float64]) -> Measure:
    """Give a value the standard error of what it is without each document, [D]."""
    left_out = len(without_each)
    if left_out < 2:
        return Measure(value, None)
    spread = float(((without_each - without_each.mean()) ** 2).sum())
    return Measure(value, math.sqrt((left_out - 1) / left_out * spread))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf
