"""Paired differences between cells of the study, over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.plan import Plan
from benchmarks.study.results import LOSS, Result
from potstill.student_trainer.ablate.intervals import Difference, difference

ECE = "ece"
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Results:
    """All results of a plan."""

    plan: Plan
    found: Mapping[tuple[str, int], Result]
    """By cell and seed."""

    def of(self, cell: str) -> list[Result]:
        """Results of a cell, by seed."""
        return [self.found[cell, seed] for seed in self.plan.seeds if (cell, seed) in self.found]

    def common(self, cell: str, base: str) -> list[int]:
        """Seeds that both cells have."""
        return [seed for seed in self.plan.seeds if {(cell, seed), (base, seed)} <= self.found.keys()]

    def mean(self, cell: str, measure: str, kind: str | None = None) -> float | None:
        """Mean over tokens and seeds, of the documents of a kind or of all; None without any."""
        ours = self.of(cell)
        if not ours:
            return None
        if measure == ECE:
            return float(np.mean([each.ece for each in ours]))
        there = _there(ours[0], kind)
        sums = [np.asarray(each.measures[measure])[there].sum() for each in ours]
        total = ours[0].counts(measure)[there].sum()
        return float(np.mean(sums) / total) if total else None

    def difference(self, cell: str, base: str, measure: str = LOSS, kind: str | None = None) -> Difference | None:
        """A cell's mean less another's; None where they have no seed in common.

        Of the calibration error there is no interval over documents, as it is no mean over them.
        """
        seeds = self.common(cell, base)
        if not seeds or cell == base:
            return None
        pairs = [(self.found[cell, seed], self.found[base, seed]) for seed in seeds]
        if measure == ECE:
            ours, theirs = (np.asarray([[pair[i].ece] for pair in pairs]) for i in (0, 1))
            return difference(ours, theirs, np.ones(1), resamples=_RESAMPLES)
        there = _there(pairs[0][0], kind)
        tokens = pairs[0][0].counts(measure)[there]
        if not tokens.sum():
            return None
        ours, theirs = (np.asarray([pair[i].measures[measure] for pair in pairs])[:, there] for i in (0, 1))
        return difference(ours, theirs, tokens, resamples=_RESAMPLES)


def _there(result: Result, kind: str | None) -> NDArray[np.bool_]:
    return np.asarray([kind in (None, each) for each in result.kinds])


def in_words(found: Difference) -> str:
    """Say whether a difference is more than noise."""
    if found.within_noise is None:
        return "unknown"
    if found.within_noise:
        return "noise"
    return "lower" if found.value < 0 else "higher"
