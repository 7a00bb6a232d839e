"""Input that a loss refuses, in one line, and some that it takes though it looks wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from potstill.cache.errors import InvalidInput, PotstillError, UnsupportedField
from potstill.student_trainer.losses import LOSSES, NO_LABEL, Loss, Objective, TeacherTargets, distillation_loss
from tests.student_trainer.losses.dense_forms import random_array, top_k_of

N, V = 4, 11


def loss_of(teacher: TeacherTargets, objective: Objective | None = None, *, masked: int = N) -> Loss:
    z, labels = random_array(0, N, V), torch.full((N,), NO_LABEL)
    mask = torch.arange(N) < masked
    return distillation_loss(
        z.requires_grad_(),
        labels,
        [teacher],
        alpha=1,
        mask=mask,
        num_labels=0,
        num_positions=masked,
        objective=objective,
    )


def teacher() -> TeacherTargets:
    return top_k_of(torch.log_softmax(random_array(1, N, V), -1), 3)


def test_a_mass_over_one_is_refused() -> None:
    good = teacher()
    heavy = TeacherTargets(good.ids, good.logprobs + 0.1, good.log_tail)
    with pytest.raises(InvalidInput, match=r"teacher 0 has a position whose probabilities sum to 1\.\d+, not to 1"):
        loss_of(heavy)
    slightly = TeacherTargets(good.ids, good.logprobs + 1e-3, good.log_tail)
    assert math.isfinite(loss_of(slightly).total.item())


def test_a_mass_over_one_in_padding_does_not_matter() -> None:
    heavy = teacher()
    heavy.logprobs[-1] = 3.0
    assert math.isfinite(loss_of(heavy, masked=N - 1).total.item())


@pytest.mark.parametrize("name", LOSSES)
def test_all_padding_is_a_loss_of_zero(name: str) -> None:
    padded = teacher()
    drawn = TeacherTargets(
        padded.ids, padded.logprobs, padded.log_tail, drawn_ids=padded.ids, drawn_counts=torch.zeros_like(padded.ids)
    )
    loss = loss_of(drawn, Objective(name), masked=0)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.total.item() == 0.0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss": "backward_kl"}, "loss is 'backward_kl'; known are forward_kl, reverse_kl, jsd, generalised_kl"),
        ({"loss": "jsd", "beta": 1.0}, "beta is 1.0; it must be over 0 and below 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
        ({"temperature": math.nan}, "temperature is nan; it must be a positive number"),
        ({"loss": "draws", "temperature": 2.0}, "temperature is 2, but draws are of temperature 1"),
    ],
)
def test_an_objective_that_is_none(values: dict[str, float], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        Objective(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (Objective("draws"), "loss 'draws' needs draws, which teacher 0 has not; prefill with --draws 50"),
        (Objective("hybrid"), "loss 'hybrid' needs draws, which teacher 0 has not"),
        (Objective(temperature=2), "temperature 2 needs log Z at it, which teacher 0 has not; prefill with --temp"),
    ],
)
def test_targets_that_lack_what_the_loss_needs(objective: Objective, told: str) -> None:
    with pytest.raises(UnsupportedField, match=told):
        loss_of(teacher(), objective)


def test_a_teacher_without_a_top_k() -> None:
    nothing = TeacherTargets(torch.empty(N, 0, dtype=torch.long), torch.empty(N, 0), torch.zeros(N))
    with pytest.raises(UnsupportedField, match="loss 'forward_kl' needs a top-k, which teacher 0 has not"):
        loss_of(nothing)


@pytest.mark.parametrize("field", ["weight", "log_z", "drawn_ids"])
def test_fields_of_another_shape(field: str) -> None:
    good = teacher()
    values = {"ids": good.ids, "logprobs": good.logprobs, "log_tail": good.log_tail, field: torch.ones(N + 1)}
    with pytest.raises(PotstillError, match=rf"teacher 0: {field} \[5\] does not fit labels \[4\]"):
        loss_of(TeacherTargets(**values))


def test_a_weight_with_an_axis_too_many() -> None:
    with pytest.raises(InvalidInput, match=r"teacher 0: weight \[4, 1\] does not fit labels \[4\]"):
        loss_of(replace(teacher(), weight=torch.ones(N, 1)))
