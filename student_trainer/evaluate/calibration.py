"""Calibration of a student: is it right as often as it is sure to be?

Each labelled position has a confidence, the probability of the likeliest token, and is right or not. Positions go into
15 bins of equal width by their confidence. The expected calibration error is the mean over positions of how far the
confidence of their bin is from its share of right ones (Guo et al., arXiv 1706.04599). Its standard error is a
jackknife over documents; the error itself is biased upwards where bins have few positions, as noise adds to it.

Shape legend:  D documents, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import JSON
from potstill.student_trainer.evaluate.means import Measure, jackknife, ratio

BINS = 15
COUNT, CONFIDENCE, RIGHT = range(3)
"""Columns of the sums of a bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The positions whose confidence lies between two bounds; at least one."""

    low: float
    high: float
    tokens: int
    confidence: float
    """Mean."""
    accuracy: Measure
    """Share at which the likeliest token is the next one."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return {
            "low": self.low,
            "high": self.high,
            "tokens": self.tokens,
            "confidence": self.confidence,
            "accuracy": self.accuracy.to_json(),
        }


def bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Choose the bin of each confidence."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(sums: NDArray[np.float64]) -> Measure | None:
    """Measure the expected calibration error of sums [D, B, 3]; None without positions."""
    sums = sums[sums[:, :, COUNT].any(axis=1)]
    if not len(sums):
        return None
    whole = sums.sum(axis=0)
    return jackknife(float(_error(whole)), _error(whole - sums))


def reliability(sums: NDArray[np.float64]) -> list[Bin]:
    """Measure each bin that has positions, of sums [D, B, 3]."""
    bins = []
    for b, (count, confidence, _) in enumerate(sums.sum(axis=0)):
        accuracy = ratio(sums[:, b, RIGHT], sums[:, b, COUNT])
        if accuracy is not None:
            low, high = b / BINS, (b + 1) / BINS
            bins.append(
                Bin(low=low, high=high, tokens=int(count), confidence=float(confidence / count), accuracy=accuracy)
            )
    return bins


def _error(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error of sums [..., B, 3]: sum over bins of |right - confidence|, over the count; 0 of nothing."""
    far = np.abs(sums[..., RIGHT] - sums[..., CONFIDENCE]).sum(axis=-1)
    found: NDArray[np.float64] = far / np.maximum(sums[..., COUNT].sum(axis=-1), 1.0)
    return found
