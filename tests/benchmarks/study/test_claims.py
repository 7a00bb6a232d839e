"""Verdicts on claims follow from intervals alone."""

from __future__ import annotations

import pytest

from benchmarks.study.claims import CLAIMS, EQUAL, HIGHER, LOWER, NOISE, NOT_RUN, REFUTED, REPRODUCED, judged, verdict
from benchmarks.study.comparing import ECE, Results
from benchmarks.study.plan import Plan
from benchmarks.study.results import Result
from potstill.student_trainer.ablate.intervals import Difference, Interval


@pytest.mark.parametrize(
    ("seeds", "documents", "expected", "said"),
    [
        ((0.1, 0.2), (0.05, 0.3), HIGHER, REPRODUCED),
        ((0.1, 0.2), (0.05, 0.3), LOWER, REFUTED),
        ((-0.2, -0.1), (-0.3, -0.05), LOWER, REPRODUCED),
        ((-0.2, -0.1), (-0.3, -0.05), HIGHER, REFUTED),
        ((-0.1, 0.2), (0.05, 0.3), HIGHER, NOISE),
        ((0.1, 0.2), (-0.05, 0.3), HIGHER, NOISE),
        ((0.1, 0.2), (-0.3, -0.1), HIGHER, NOISE),
        ((-0.01, 0.02), (-0.03, 0.04), EQUAL, REPRODUCED),
        ((-0.01, 0.06), (-0.03, 0.04), EQUAL, NOISE),
        ((0.06, 0.07), (0.051, 0.09), EQUAL, REFUTED),
        ((-0.09, -0.06), (-0.09, -0.06), EQUAL, REFUTED),
        ((0.06, 0.07), (-0.09, -0.06), EQUAL, NOISE),
        (None, (0.05, 0.3), HIGHER, NOISE),
        ((0.1, 0.2), None, HIGHER, NOISE),
    ],
)
def test_what_a_difference_says(
    seeds: tuple[float, float] | None, documents: tuple[float, float] | None, expected: str, said: str
) -> None:
    over = [None if each is None else Interval(*each) for each in (seeds, documents)]
    assert verdict(Difference(0.0, *over), expected, 0.05) == said


def test_the_calibration_error_has_seeds_alone() -> None:
    assert verdict(Difference(0.1, Interval(0.05, 0.2), None), HIGHER, 0.0, by_documents=False) == REPRODUCED


def result(cell: str, seed: int, loss: float, sure: float) -> Result:
    """Twelve documents of ten tokens, with losses that differ from each other nearly alike in all cells and seeds."""
    sums = [10.0 * loss * (1.0 + 0.001 * seed + 0.001 * i) for i in range(12)]
    return Result(
        plan="",
        cell=cell,
        seed=seed,
        tokens=100,
        seconds=1.0,
        parameters=10,
        made={},
        kinds=["prose"] * 12,
        labels=[10] * 12,
        positions=[10] * 12,
        measures={"loss": sums, "kl": sums},
        bins=[[120.0, 120.0 * (0.5 + sure * (1.0 + 0.001 * seed)), 60.0]],
        curve=[],
    )


def test_claims_are_judged_where_all_seeds_are_there() -> None:
    losses = {"cross-entropy": 6.0, "dense": 5.0, "renormalised-12": 6.5, "draws-50": 5.01}
    found = {(cell, seed): result(cell, seed, loss, loss / 100) for cell, loss in losses.items() for seed in range(3)}
    by_pair = {(each.claim.cell, each.claim.base, each.claim.measure): each for each in judged(Results(Plan(), found))}
    assert len(by_pair) == len(CLAIMS)
    assert by_pair["dense", "cross-entropy", "loss"].verdict == REPRODUCED
    assert by_pair["renormalised-12", "cross-entropy", "loss"].verdict == REPRODUCED
    assert by_pair["renormalised-12", "cross-entropy", ECE].verdict == REPRODUCED
    assert by_pair["draws-50", "dense", "loss"].verdict == REPRODUCED
    assert by_pair["top-64", "renormalised-64", "loss"].verdict == NOT_RUN
    del found["draws-50", 2]
    told = next(each for each in judged(Results(Plan(), found)) if each.claim.cell == "draws-50")
    assert (told.verdict, told.seeds) == (NOT_RUN, 2)
    assert told.difference is not None, "what is there is shown"


def test_a_top_12_that_is_better_than_nothing_refutes() -> None:
    losses = {"cross-entropy": 6.0, "renormalised-12": 5.5}
    found = {(cell, seed): result(cell, seed, loss, 0.0) for cell, loss in losses.items() for seed in range(3)}
    told = next(each for each in judged(Results(Plan(), found)) if each.claim.cell == "renormalised-12")
    assert told.verdict == REFUTED
