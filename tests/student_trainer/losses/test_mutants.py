"""Wrong losses that people have written by mistake: each must be far from what our tests hold the right one to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.student_trainer.losses import NO_LABEL, Objective, TeacherTargets, distillation_loss
from tests.student_trainer.losses.dense_forms import dense_loss, random_array, top_k_of

B, T, V = 3, 5, 31
ALPHA = 0.7

Teachers = Sequence[TeacherTargets]


def batch() -> tuple[Tensor, Tensor, Tensor, list[TeacherTargets]]:
    """Logits, labels, a mask of rows of other lengths, and two teachers."""
    z = random_array(1, B, T, V)
    labels = torch.arange(B * T).reshape(B, T) % V
    mask = torch.arange(T) < torch.tensor([[5], [3], [2]])
    labels[~mask] = NO_LABEL
    labels[:, 1:][~mask[:, 1:] & mask[:, :-1]] = NO_LABEL
    common = random_array(2, B, T, V)
    dense = [torch.log_softmax(common + random_array(seed, B, T, V), -1) for seed in (3, 4)]
    return z, labels, mask, [top_k_of(dense[0], 6, weight=0.4), top_k_of(dense[1], 4, weight=0.6)]


def whole(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    num_labels, num_positions = int((labels != NO_LABEL).sum()), int(mask.sum())
    return distillation_loss(
        z, labels, teachers, alpha=ALPHA, mask=mask, num_labels=num_labels, num_positions=num_positions
    ).total


def absent_ids_as_zero(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    """Average the teachers over all ids, where one has 0 for what only the other keeps."""
    t = torch.zeros(B, T, V, dtype=torch.float64)
    log_tail = torch.zeros(B, T, dtype=torch.float64)
    for teacher in teachers:
        t.scatter_add_(-1, teacher.ids, teacher.weight * teacher.logprobs.exp())
        log_tail += teacher.weight * teacher.log_tail.exp()
    logprobs, ids = t.topk(8, -1)
    return whole(z, labels, mask, [TeacherTargets(ids, logprobs.log(), log_tail.log())])


def renormalised(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    return whole(
        z,
        labels,
        mask,
        [
            TeacherTargets(t.ids, t.logprobs.log_softmax(-1), torch.full_like(t.log_tail, -math.inf), t.weight)
            for t in teachers
        ],
    )


def without_tail(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    none = torch.full((B, T), -math.inf, dtype=torch.float64)
    return whole(z, labels, mask, [TeacherTargets(t.ids, t.logprobs, none, t.weight) for t in teachers])


def shifted(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    return whole(z, labels, mask, [t.each(lambda tensor: tensor.roll(1, dims=1)) for t in teachers])


def mean_of_ranks(z: Tensor, labels: Tensor, mask: Tensor, teachers: Teachers) -> Tensor:
    rows = [slice(i, i + 1) for i in range(B)]
    parts = [whole(z[r], labels[r], mask[r], [_row(t, r) for t in teachers]) for r in rows]
    return torch.stack(parts).mean()


def _row(teacher: TeacherTargets, row: slice) -> TeacherTargets:
    return teacher.each(lambda tensor: tensor[row])


def far(loss: Callable[..., Tensor]) -> tuple[float, float]:
    """Measure how far a loss and its gradient are from the dense form, relative to it."""
    z, labels, mask, teachers = batch()
    exact, z = z.clone().requires_grad_(), z.requires_grad_()
    counts: dict[str, Any] = {"num_labels": int((labels != NO_LABEL).sum()), "num_positions": int(mask.sum())}
    expected = dense_loss(exact, labels, mask, teachers, Objective(), alpha=ALPHA, **counts)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    found = loss(z, labels, mask, teachers)
    (grad,) = torch.autograd.grad(found, z)
    away = (grad - expected_grad).abs().max() / expected_grad.abs().max()
    return abs(found.item() / expected.item() - 1), away.item()


def test_the_right_loss_is_near() -> None:
    assert max(far(whole)) < 1e-10


@pytest.mark.parametrize("mutant", [absent_ids_as_zero, renormalised, without_tail, shifted, mean_of_ranks])
def test_a_wrong_loss_is_far(mutant: Callable[..., Tensor]) -> None:
    assert min(far(mutant)) > 1e-2
