"""Weights of teachers at each token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from potstill.cache.errors import UnsupportedField
from potstill.student_trainer.losses import TeacherTargets, weighted


def teacher(entropy: list[float], label: list[float]) -> TeacherTargets:
    n = len(entropy)
    ids, logprobs = torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1)
    return TeacherTargets(
        ids,
        logprobs,
        torch.full((n,), -math.inf),
        entropy=torch.tensor(entropy),
        label_logprob=torch.tensor(label),
    )


FIRST, SECOND = teacher([1.0, 2.0, 0.0], [-1.0, -math.inf, math.nan]), teacher([3.0, 2.0, 0.5], [-2.0, -4.0, math.nan])


def weights(weighting: str, beta: float = 1.0) -> list[list[float]]:
    found = []
    for each in weighted([FIRST, SECOND], [0.25, 0.75], weighting, beta):
        assert isinstance(each.weight, torch.Tensor)
        found.append(each.weight.tolist())
    return found


def test_fixed_weights_are_those_given() -> None:
    assert [each.weight for each in weighted([FIRST, SECOND], [0.25, 0.75])] == [0.25, 0.75]


def test_a_teacher_of_no_weight_has_none_whatever_it_knows() -> None:
    first, second = weighted([FIRST, SECOND], [0.0, 1.0], "label")
    assert isinstance(first.weight, torch.Tensor)
    assert isinstance(second.weight, torch.Tensor)
    assert (first.weight.tolist(), second.weight.tolist()) == ([0.0] * 3, [1.0] * 3)


def test_a_teacher_that_is_sure_counts_more() -> None:
    first, second = weights("entropy", beta=2.0)
    for m, (h, k) in enumerate([(1.0, 3.0), (2.0, 2.0), (0.0, 0.5)]):
        a, b = 0.25 * math.exp(-h / 2), 0.75 * math.exp(-k / 2)
        assert first[m] == pytest.approx(a / (a + b))
        assert second[m] == pytest.approx(b / (a + b))


def test_a_teacher_that_finds_the_label_likely_counts_more() -> None:
    first, second = weights("label")
    assert first[0] == pytest.approx(0.25 * math.exp(-1) / (0.25 * math.exp(-1) + 0.75 * math.exp(-2)))
    assert (first[1], second[1]) == (0.0, 1.0)
    assert (first[2], second[2]) == pytest.approx((0.25, 0.75)), "a token without a label"


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedField, match="weighting 'entropy' needs entropy, which teacher 0 has not"):
        weighted([replace(FIRST, entropy=None)], [1.0], "entropy")
