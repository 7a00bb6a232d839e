"""Differences between two cells, and how sure they are: over seeds, and over documents.

Both cells were trained once with each seed and judged on the same documents, so that whatever a seed or a document
does to both drops out of the difference. Two things could have come out otherwise:

    over seeds       other initial weights and orders, judged on these documents: Student's t on the differences of
                     the seeds, of which two are enough
    over documents   these students, judged on other documents of the same kind: the bootstrap-t, which draws whole
                     documents (Efron and Tibshirani 1993, section 12.5); percentiles alone are too narrow for few

Neither holds the other's chance, so that a difference counts only where both leave zero out. Questions of a task are
documents here.

A measure is a sum over documents, divided by their counts. A calibration error is a sum of absolute values, one of each
bin's sum over documents: a document's part in a bin counts with the sign that the bin has over all of them, which makes
it a sum like the others (the delta method). Noise adds to a calibration error, and more to the smaller of two, so that
the interval is of sets of as many documents, which differ by less than all documents would. Choosing the
signs anew in each draw counts noise twice, and was further from the truth in simulations.

Shape legend:  S seeds, D documents, B bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
FEWEST_DOCUMENTS = 10
"""Below this the bootstrap knows too few documents, on which the cells differ, to say how others would."""
_LEAST_ERROR = 0.01
"""A draw whose error is a smaller share of the sample's has missed the few documents that hold the difference."""
_ROUNDING = 1e-12
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A range that a difference lies in with `CONFIDENCE`."""

    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        """True if there may be no difference."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True)
class Difference:
    """A cell's mean over tokens less the baseline's, averaged over seeds."""

    value: float
    over_seeds: Interval | None
    """None where there is one seed only, or all seeds came out alike, as counts of few questions do."""
    over_documents: Interval | None
    """None where there are fewer than ten documents on which the two differ, or so few hold nearly all of the spread
    that many draws miss them."""

    @property
    def within_noise(self) -> bool | None:
        """True if an interval has zero in it; None where one of them is not known and the other has not."""
        known = [each for each in (self.over_seeds, self.over_documents) if each is not None]
        if any(each.has_zero for each in known):
            return True
        return False if len(known) == 2 else None


def difference(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    tokens: NDArray[np.float64],
    *,
    resamples: int,
    seed: int = 0,
) -> Difference:
    """Compare a cell with the baseline.

    Args:
        ours: [S, D] sum over each document's tokens, of the cell; [S, D, B] of a calibration error.
        theirs: as that, of the baseline.
        tokens: [D] tokens that the sums are of.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    per_document = signed(ours) - signed(theirs)
    by_seed = per_document.sum(axis=1) / tokens.sum()
    mean = by_seed.mean()
    return Difference(
        float(mean), _of_seeds(by_seed), _of_documents(per_document.mean(axis=0), tokens, resamples, seed)
    )


def signed(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give sums [S, D] whose totals are the measure's: as they are, or of the bins [S, D, B] of a calibration error."""
    if sums.ndim == 2:
        return sums
    found: NDArray[np.float64] = (sums * np.sign(sums.sum(axis=1, keepdims=True))).sum(axis=-1)
    return found


def _of_seeds(by_seed: NDArray[np.float64]) -> Interval | None:
    """Student's t interval of a mean of S numbers."""
    number = len(by_seed)
    if number < 2 or (by_seed.any() and np.ptp(by_seed) <= _ROUNDING * np.abs(by_seed).max()):
        return None  # seeds that tie do not tell by how much others would differ
    half = stats.t.ppf((1.0 + CONFIDENCE) / 2.0, number - 1) * by_seed.std(ddof=1) / math.sqrt(number)
    return Interval(float(by_seed.mean() - half), float(by_seed.mean() + half))


def _of_documents(sums: NDArray[np.float64], tokens: NDArray[np.float64], resamples: int, seed: int) -> Interval | None:
    """Bootstrap-t interval of the ratio of two sums [D] over documents."""
    number = len(sums)
    if number < FEWEST_DOCUMENTS:
        return None
    draw = np.random.default_rng(seed)
    mean, error = (float(each[0]) for each in _ratio(sums[None], tokens[None]))
    if error == 0.0:
        return Interval(mean, mean)
    if np.count_nonzero(sums) < FEWEST_DOCUMENTS:
        return None  # draws without any of them would have no error to be measured by
    at_once = max(1, _NUMBERS_AT_ONCE // number)
    shifts, missed = [], 0
    for start in range(0, resamples, at_once):
        drawn = draw.integers(0, number, (min(at_once, resamples - start), number))
        means, errors = _ratio(sums[drawn], tokens[drawn])
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one document again and again
            shifts.append((means - mean) / errors)
        missed += int(np.count_nonzero(errors < _LEAST_ERROR * error))
    if missed >= resamples * (1.0 - CONFIDENCE) / 2.0:
        return None  # they would be the quantiles
    low, high = np.nanquantile(np.concatenate(shifts), [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return Interval(mean - float(high) * error, mean - float(low) * error)


def _ratio(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratios of sums [R, D] to tokens [R, D], and their linearised standard errors."""
    number = sums.shape[1]
    means = sums.sum(axis=1) / tokens.sum(axis=1)
    apart = sums - means[:, None] * tokens
    return means, np.sqrt((apart**2).sum(axis=1) * (number / (number - 1))) / tokens.sum(axis=1)
