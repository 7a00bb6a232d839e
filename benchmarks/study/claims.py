"""Claims of "Sparse Logit Sampling" (arXiv 2503.16870), held against the study's numbers by rule.

A claim that one cell is above or below another is `reproduced` where the difference has that sign and neither 95%
interval has zero in it (`ablate.intervals`), `refuted` where it has the other sign so surely, and `within the noise`
else. One that two cells are equal means that their difference is less than a tenth of what dense distillation gains
over cross-entropy: `reproduced` where both intervals lie within that, `refuted` where both lie outside on one side.
Until all seeds of both cells are there, a claim is `not yet run`. The calibration error has the interval over seeds
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.study.comparing import ECE, Results
from benchmarks.study.plan import CROSS_ENTROPY, DENSE
from benchmarks.study.results import KL, LOSS
from potstill.student_trainer.ablate.intervals import Difference

REPRODUCED, REFUTED, NOISE, NOT_RUN = "reproduced", "refuted", "within the noise", "not yet run"
HIGHER, LOWER, EQUAL = "higher", "lower", "equal"
EQUAL_SHARE = 0.1
"""Share of the gain of dense distillation below which a difference counts as none."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: how a cell lies to another in a measure."""

    told: str
    cell: str
    base: str
    expected: str
    measure: str = LOSS


CLAIMS = (
    Claim("distillation from all probabilities is better than none", DENSE, CROSS_ENTROPY, LOWER),
    Claim("top-12 without a tail is worse than no distillation", "renormalised-12", CROSS_ENTROPY, HIGHER),
    Claim("draws of about 12 different ids (here 50 draws) are as good as all probabilities", "draws-50", DENSE, EQUAL),
    Claim("so are 12 draws", "draws-12", DENSE, EQUAL),
    Claim("top-64 without a tail is worse than all probabilities", "renormalised-64", DENSE, HIGHER),
    Claim("the mass of the tail makes top-64 better", "top-64", "renormalised-64", LOWER),
    Claim("draws are better than a top-k of their size without a tail", "draws-50", "renormalised-12", LOWER),
    Claim(
        "top-12 without a tail is worse calibrated than no distillation", "renormalised-12", CROSS_ENTROPY, HIGHER, ECE
    ),
    Claim("top-12 without a tail is further from the teacher than draws", "renormalised-12", "draws-50", HIGHER, KL),
)


@dataclass(frozen=True, slots=True)
class Told:
    """A claim with what the numbers say."""

    claim: Claim
    verdict: str
    seeds: int
    """Seeds that both cells have."""
    difference: Difference | None


def judged(results: Results) -> list[Told]:
    """Hold all claims of cells that the plan has against the results."""
    names = {cell.name for cell in results.plan.cells}
    return [_told(results, claim) for claim in CLAIMS if {claim.cell, claim.base} <= names]


def _told(results: Results, claim: Claim) -> Told:
    seeds = len(results.common(claim.cell, claim.base))
    found = results.difference(claim.cell, claim.base, claim.measure)
    gain = results.difference(CROSS_ENTROPY, DENSE, claim.measure)
    if found is None or seeds < len(results.plan.seeds) or (claim.expected == EQUAL and gain is None):
        return Told(claim, NOT_RUN, seeds, found)
    margin = EQUAL_SHARE * abs(gain.value) if gain is not None else 0.0
    return Told(claim, verdict(found, claim.expected, margin, by_documents=claim.measure != ECE), seeds, found)


def verdict(found: Difference, expected: str, margin: float, *, by_documents: bool = True) -> str:
    """Say what a difference means for a claim.

    Args:
        found: the difference.
        expected: `HIGHER`, `LOWER` or `EQUAL`.
        margin: below this a difference counts as none, where `EQUAL` is expected.
        by_documents: False for a measure that has no interval over documents.
    """
    intervals = [found.over_seeds, *([found.over_documents] if by_documents else [])]
    known = [(each.low, each.high) for each in intervals if each is not None]
    if len(known) < len(intervals):
        return NOISE

    def all_are(test: Callable[[float, float], bool]) -> bool:
        return all(test(low, high) for low, high in known)

    if expected == EQUAL:
        if all_are(lambda low, high: -margin < low and high < margin):
            return REPRODUCED
        apart = all_are(lambda low, _: low > margin) or all_are(lambda _, high: high < -margin)
        return REFUTED if apart else NOISE
    above, below = all_are(lambda low, _: low > 0.0), all_are(lambda _, high: high < 0.0)
    if not (above or below):
        return NOISE
    return REPRODUCED if above == (expected == HIGHER) else REFUTED
