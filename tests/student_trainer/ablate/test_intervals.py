"""Intervals of differences: they cover the truth as often as they say, in simulated ablations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from potstill.student_trainer.ablate.intervals import Difference, Interval, difference

SEEDS, DOCUMENTS, EFFECT = 3, 60, 0.05


def test_intervals_cover_the_truth_in_95_of_100_simulated_ablations() -> None:
    """Each document and each seed has an effect of its own, and both together one more."""
    random = np.random.default_rng(1)
    over_seeds = over_documents = 0
    for _ in range(1000):
        tokens = random.integers(20, 400, DOCUMENTS).astype(float)
        of_documents = EFFECT + random.normal(0, 0.08, DOCUMENTS)
        of_seeds = random.normal(0, 0.03, SEEDS)
        theirs = 3 + random.lognormal(0, 0.5, DOCUMENTS) + random.normal(0, 0.3, (SEEDS, 1))
        ours = theirs + of_documents + of_seeds[:, None] + random.normal(0, 0.05, (SEEDS, DOCUMENTS))
        found = difference(ours * tokens, theirs * tokens, tokens, resamples=500)
        assert found.over_seeds is not None
        assert found.over_documents is not None
        # Other seeds on these documents; these students on other documents.
        over_seeds += found.over_seeds.low <= of_documents @ tokens / tokens.sum() <= found.over_seeds.high
        over_documents += found.over_documents.low <= EFFECT + of_seeds.mean() <= found.over_documents.high
    assert 930 <= over_seeds <= 970
    assert 930 <= over_documents <= 970


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([0.02, -0.03, 0.05, 0.004], [0.02, 0.01, 0.0, -0.02]), ([0.002, -0.001, 0.001, 0.0], [0.0, 0.001, 0.0, -0.002])],
)
def test_intervals_of_calibration_errors_cover_the_truth_too(ours: list[float], theirs: list[float]) -> None:
    """By how much each bin is off: some by so little that the side is chance, as it is in all bins of the second."""
    random = np.random.default_rng(6)
    truth = np.abs(ours).sum() - np.abs(theirs).sum()
    covered = 0
    for _ in range(300):
        tokens = random.integers(20, 400, DOCUMENTS).astype(float)
        shared = random.normal(0, 0.02, (DOCUMENTS, 4))  # of a document, whoever reads it
        sums = [
            (np.array(each) + shared + random.normal(0, 0.01, (SEEDS, DOCUMENTS, 4))) * tokens[:, None]
            for each in (ours, theirs)
        ]
        found = difference(sums[0], sums[1], tokens, resamples=200)
        errors = [np.abs(each.sum(axis=1)).sum(axis=1) / tokens.sum() for each in sums]
        assert found.value == pytest.approx((errors[0] - errors[1]).mean())
        assert found.over_documents is not None
        covered += found.over_documents.low <= truth <= found.over_documents.high
    # Noise adds to a calibration error, and less to the greater one: the difference is a little too small.
    assert 273 <= covered <= 294


def test_few_documents_that_differ_have_no_interval() -> None:
    """As with questions that nearly all students answer alike."""
    ours = np.zeros((2, 40))
    ours[:, :9] = 1.0
    assert difference(ours, np.zeros_like(ours), np.ones(40), resamples=50).over_documents is None
    ours[:, 9] = 1.0
    found = difference(ours, np.zeros_like(ours), np.ones(40), resamples=500).over_documents
    assert found is not None
    assert 0.0 < found.low < 0.25 < found.high < 0.5


def test_the_interval_over_seeds_is_scipys_paired_t() -> None:
    random = np.random.default_rng(2)
    ours, theirs, tokens = (
        random.normal(2, 1, (5, 30)),
        random.normal(2, 1, (5, 30)),
        random.integers(1, 9, 30).astype(np.float64),
    )
    found = difference(ours, theirs, tokens, resamples=10).over_seeds
    per_seed = [each.sum(axis=1) / tokens.sum() for each in (ours, theirs)]
    right = stats.ttest_rel(*per_seed).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((right.low, right.high), rel=1e-12)


def test_the_interval_over_documents_is_near_that_of_scipys_bootstrap_where_documents_are_many() -> None:
    random = np.random.default_rng(3)
    tokens = random.integers(20, 400, 2000).astype(np.float64)
    apart = random.normal(0.1, 0.5, (2, 2000)) * tokens
    found = difference(apart, np.zeros_like(apart), tokens, resamples=2000).over_documents
    right = stats.bootstrap(
        (apart.mean(axis=0), tokens),
        lambda x, n, axis: x.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="BCa",
        n_resamples=1000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    width = right.high - right.low
    assert found is not None
    assert (found.low, found.high) == pytest.approx((right.low, right.high), abs=width / 10)


def test_what_is_within_the_noise_is_said_to_be() -> None:
    clear, wide = Interval(0.1, 0.2), Interval(-0.1, 0.3)
    assert Difference(0.15, clear, clear).within_noise is False
    assert Difference(0.15, clear, wide).within_noise is True
    assert Difference(0.15, wide, None).within_noise is True
    assert Difference(0.15, clear, None).within_noise is None


def test_students_that_do_not_differ_have_no_width() -> None:
    same = np.ones((3, 20))
    found = difference(same, same, np.ones(20), resamples=50)
    assert found == Difference(0.0, Interval(0.0, 0.0), Interval(0.0, 0.0))
    assert found.within_noise


@pytest.mark.parametrize("common", [1e-6, 0.001])
def test_differences_that_few_documents_hold_have_no_interval(common: float) -> None:
    """Draws without these have hardly an error, by which the bootstrap reached far beyond every document."""
    apart = np.random.default_rng(6).normal(common, 1e-8, (3, 60))
    apart[:, [2, 7, 30]] = 0.05
    assert difference(apart, np.zeros_like(apart), np.ones(60), resamples=500).over_documents is None


def test_one_document_that_is_far_longer_than_others_takes_no_interval_away() -> None:
    tokens = np.array([200_000.0, *[500.0] * 60])
    apart = np.random.default_rng(7).normal(0.5, 0.02, (3, 61)) * tokens
    found = difference(apart, np.zeros_like(apart), tokens, resamples=500).over_documents
    assert found is not None
    assert 0.4 < found.low < found.high < 0.6


def test_seeds_that_tie_do_not_tell_how_others_would_differ() -> None:
    """As where each seed's student has answered one question more than its twin."""
    right = np.zeros((3, 36))
    right[[0, 1, 2], [4, 9, 30]] = 1.0
    found = difference(right, np.zeros_like(right), np.ones(36), resamples=50)
    assert found.over_seeds is None
    assert found.value == pytest.approx(1 / 36)
    assert found.within_noise is None


def test_too_few_documents_or_seeds_have_no_interval() -> None:
    random = np.random.default_rng(5)
    found = difference(random.normal(size=(1, 9)), np.zeros((1, 9)), np.ones(9), resamples=50)
    assert (found.over_seeds, found.over_documents) == (None, None)
