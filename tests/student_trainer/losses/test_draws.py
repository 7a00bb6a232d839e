"""Losses of draws: in the mean over all draws, their gradient is that of the full distillation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from potstill.student_trainer.losses import NO_LABEL, Objective, TeacherTargets, distillation_loss
from tests.student_trainer.losses.dense_forms import random_array

V, DRAWS, K = 5, 3, 2


def every_draw() -> tuple[TeacherTargets, Tensor, Tensor]:
    """All V**N draws in a row, one a position, with the probability [V**N] of each and the distribution [V]."""
    log_t = torch.log_softmax(2 * random_array(0, V), -1)
    drawn = torch.tensor(list(itertools.product(range(V), repeat=DRAWS)))
    counts = torch.nn.functional.one_hot(drawn, V).sum(1)
    logprobs, ids = log_t.expand(len(drawn), V).topk(K, -1)
    log_tail = torch.log1p(-logprobs.exp().sum(-1))
    everything = torch.arange(V).expand(len(drawn), V)
    teacher = TeacherTargets(ids, logprobs, log_tail, drawn_ids=everything, drawn_counts=counts)
    return teacher, log_t[drawn].sum(-1).exp(), log_t


@pytest.mark.parametrize("name", ["draws", "hybrid"])
def test_the_mean_gradient_over_all_draws_is_that_of_the_whole_distribution(name: str) -> None:
    teacher, chance, log_t = every_draw()
    z = random_array(1, V)
    leaf = z.expand(len(chance), V).contiguous().requires_grad_()
    loss = distillation_loss(
        leaf,
        torch.full((len(chance),), NO_LABEL),
        [teacher],
        alpha=1,
        mask=torch.ones(len(chance), dtype=torch.bool),
        num_labels=0,
        num_positions=1,
        objective=Objective(name),
    )
    (grad,) = torch.autograd.grad(loss.total, leaf)
    torch.testing.assert_close(chance @ grad, torch.softmax(z, -1) - log_t.exp(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["draws", "hybrid"])
def test_the_loss_is_the_cross_entropy_to_what_was_drawn(name: str) -> None:
    ids, logprobs = torch.tensor([[4, 1]]), torch.tensor([[0.5, 0.2]]).double().log()
    drawn, counts = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[6, 3, 1, 0]])
    teacher = TeacherTargets(ids, logprobs, torch.tensor([0.3]).double().log(), drawn_ids=drawn, drawn_counts=counts)
    z = random_array(2, 1, V).requires_grad_()
    loss = distillation_loss(
        z,
        torch.tensor([NO_LABEL]),
        [teacher],
        alpha=1,
        mask=torch.tensor([True]),
        num_labels=0,
        num_positions=1,
        objective=Objective(name),
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    target = {"draws": [0.0, 0.6, 0.3, 0.1, 0.0], "hybrid": [0.0, 0.2, 0.3, 0.1, 0.5]}[name]
    t, log_p = torch.tensor([target]).double(), torch.log_softmax(z.detach(), -1)
    torch.testing.assert_close(loss.total, -(t * log_p).sum(), check_dtype=False)
    torch.testing.assert_close(grad, log_p.exp() * t.sum() - t, rtol=0, atol=1e-7)
    assert math.isclose(loss.kl_sums.item(), loss.total.item())
