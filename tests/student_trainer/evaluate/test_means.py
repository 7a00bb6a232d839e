"""Standard errors of means over documents: against textbook formulas and a bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from potstill.student_trainer.evaluate.means import Measure, jackknife, perplexity, ratio
from potstill.student_trainer.evaluate.tables import measure_text


def test_documents_of_one_length_have_the_textbook_standard_error() -> None:
    means = np.random.default_rng(0).normal(3.0, 1.0, 50)
    found = ratio(means * 7, np.full(50, 7.0))
    assert found is not None
    assert found.value == pytest.approx(means.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_documents_of_many_lengths_have_the_error_that_a_bootstrap_finds() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(5, 60, 200).astype(float)
    sums = counts * random.normal(2.0, 0.4, 200) + random.normal(0.0, 3.0, 200)
    found = ratio(sums, counts)
    drawn = random.integers(0, 200, (4000, 200))
    brute = (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).std()
    assert found is not None
    # 4,000 draws know a standard deviation within 1 / sqrt(8,000), 1.1%; the linearisation is off by about 1/200.
    assert found.stderr == pytest.approx(brute, rel=0.05)


def test_the_intervals_cover_the_truth() -> None:
    random, inside = np.random.default_rng(2), 0
    for _ in range(1000):
        counts = random.integers(5, 60, 80).astype(float)
        found = ratio(counts * random.normal(2.0, 0.4, 80), counts)
        assert found is not None
        assert found.stderr is not None
        inside += abs(found.value - 2.0) < 1.96 * found.stderr
    # 950 are expected, within 3 * sqrt(47.5); the linearised error is a little small with so few documents.
    assert 920 <= inside <= 971


def test_one_document_has_no_error_and_none_no_mean() -> None:
    assert ratio(np.array([6.0]), np.array([2.0])) == Measure(3.0, None)
    assert ratio(np.array([6.0, 0.0]), np.array([2.0, 0.0])) == Measure(3.0, None), "an empty document is none"
    assert ratio(np.zeros(2), np.zeros(2)) is None
    assert jackknife(0.5, np.array([0.0])) == Measure(0.5, None)


def test_a_perplexity_has_the_error_of_the_delta_method() -> None:
    found = perplexity(Measure(2.0, 0.1))
    assert found.value == pytest.approx(math.exp(2.0))
    assert found.stderr == pytest.approx(0.1 * math.exp(2.0))
    assert perplexity(Measure(800.0, 0.1)).to_json() == {"value": None, "stderr": None}
    assert perplexity(Measure(1.0, None)).to_json() == {"value": pytest.approx(math.e), "stderr": None}


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=40)
    without = (values.sum() - values) / 39
    assert jackknife(float(values.mean()), without).stderr == pytest.approx(values.std(ddof=1) / math.sqrt(40))


@pytest.mark.parametrize(
    ("measure", "share", "text"),
    [
        (None, False, "-"),
        (Measure(3.14159, None), False, "3.142"),
        (Measure(3.14159, 0.0123), False, "3.142 ± 0.012"),
        (Measure(1234.5, 98.7), False, "1,234 ± 99"),
        (Measure(0.16, 0.0089), True, "16.00% ± 0.89"),
        (Measure(0.0, 0.0), True, "0% ± 0"),
        (Measure(6.6e-8, 1e-9), False, "6.6e-08 ± 1e-09"),
        (Measure(math.inf, math.inf), False, "over 1e308"),
    ],
)
def test_a_measure_is_written_with_two_digits_of_its_error(measure: Measure | None, share: bool, text: str) -> None:
    assert measure_text(measure, share=share) == text
