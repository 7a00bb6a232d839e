"""Every loss's gradient against autograd of its dense form, in each precision and under peaked students."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from potstill.student_trainer.losses import NO_LABEL, Objective, TeacherTargets, distillation_loss
from tests.student_trainer.losses.dense_forms import TOP_K_LOSSES, dense_loss, exact_gradient, random_array, top_k_of

N, V = 6, 41
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error of an entry, relative to the largest entry."""


def two_teachers() -> list[TeacherTargets]:
    """Two teachers that share some of their most likely ids."""
    common = random_array(1, N, V)
    found = []
    for seed, k, weight in ((2, 7, 0.3), (3, 5, 0.7)):
        dense = torch.log_softmax(2 * common + 1.5 * random_array(seed, N, V), -1)
        found.append(top_k_of(dense, k, weight=weight))
    shared = [set(a) & set(b) for a, b in zip(found[0].ids.tolist(), found[1].ids.tolist(), strict=True)]
    assert all(shared)
    assert sum(len(ids) < 5 for ids in shared) > N // 2
    return found


def random_labels() -> tuple[Tensor, Tensor]:
    labels = torch.tensor([0, 5, 40, 7, NO_LABEL, 9])
    return labels, torch.tensor([True, True, True, True, True, False])


def errors(z: Tensor, teachers: list[TeacherTargets], objective: Objective, alpha: float = 0.6) -> tuple[float, float]:
    """Errors of the loss, and of the gradient relative to its largest entry."""
    labels, mask = random_labels()
    exact = z.detach().double().requires_grad_()
    expected = dense_loss(exact, labels, mask, teachers, objective, alpha=alpha, num_labels=4, num_positions=5)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    z = z.detach().requires_grad_()
    loss = distillation_loss(
        z,
        labels,
        teachers,
        alpha=alpha,
        mask=mask,
        num_labels=4,
        num_positions=5,
        chunk_positions=2,
        objective=objective,
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    assert grad.dtype == z.dtype
    far = (grad.double() - expected_grad).abs().max() / expected_grad.abs().max()
    return abs(loss.total.item() - expected.item()) / abs(expected.item()), far.item()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", TOP_K_LOSSES)
@pytest.mark.parametrize("how_many", [1, 2, 3])
def test_each_loss_is_its_dense_form(name: str, dtype: torch.dtype, how_many: int) -> None:
    z = (2 * random_array(4, N, V)).to(dtype)
    a, b = two_teachers()
    value, grad = errors(z, [a, b, replace(a, weight=0.2)][:how_many], Objective(name))
    assert value < (1e-12 if dtype == torch.float64 else 1e-5)
    assert grad < BOUNDS[dtype]


def sure_student(teacher: TeacherTargets, nats: float) -> Tensor:
    """Logits whose softmax is `nats` further on the teacher's first choice than on all else."""
    z, best = random_array(5, N, V), teacher.ids[:, :1]
    return z.scatter_(-1, best, torch.logsumexp(z.scatter(-1, best, -math.inf), -1, keepdim=True) + nats)


@pytest.mark.parametrize("name", TOP_K_LOSSES)
@pytest.mark.parametrize("nats", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("whose", [0, 1])
def test_a_student_that_is_sure_of_one_teachers_choice(name: str, nats: float, whose: int) -> None:
    """To the other teacher that id may be a part of the tail, or the tail of either may be e**-60 of the student."""
    teachers = two_teachers()
    z = sure_student(teachers[whose], nats)
    for dtype in (torch.float64, torch.float32):
        value, grad = errors(z.to(dtype), teachers, Objective(name))
        assert value < (1e-10 if dtype == torch.float64 else 1e-5)
        assert grad < BOUNDS[dtype]


@pytest.mark.parametrize("name", TOP_K_LOSSES)
@pytest.mark.parametrize("nats", [20.0, 60.0])
def test_gradients_that_vanish_with_the_students_doubts_keep_their_digits(name: str, nats: float) -> None:
    """Compare with differences of numbers of 100 digits: autograd's float64 is nothing but rounding there."""
    teachers = [teacher.each(lambda tensor: tensor[:1]) for teacher in two_teachers()]
    z = sure_student(two_teachers()[0], nats)[:1].float()
    labels, mask = torch.tensor([NO_LABEL]), torch.tensor([True])
    expected = exact_gradient(z[0].tolist(), teachers, name)
    for dtype in (torch.float64, torch.float32):
        logits = z.to(dtype).requires_grad_()
        loss = distillation_loss(
            logits, labels, teachers, alpha=1, mask=mask, num_labels=0, num_positions=1, objective=Objective(name)
        )
        (grad,) = torch.autograd.grad(loss.total, logits)
        far = (grad[0].double() - expected).abs().max() / expected.abs().max()
        assert far < BOUNDS[dtype]


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jsd_of_other_betas(beta: float) -> None:
    value, grad = errors(random_array(6, N, V), two_teachers(), Objective("jsd", beta=beta))
    assert value < 1e-12
    assert grad < 1e-10


@pytest.mark.parametrize("name", TOP_K_LOSSES)
def test_a_weight_for_each_position(name: str) -> None:
    first, second = two_teachers()
    weights = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teachers = [
        TeacherTargets(first.ids, first.logprobs, first.log_tail, weights),
        TeacherTargets(second.ids, second.logprobs, second.log_tail, 1 - weights),
    ]
    value, grad = errors(random_array(7, N, V), teachers, Objective(name))
    assert value < 1e-12
    assert grad < 1e-10


@pytest.mark.parametrize("name", TOP_K_LOSSES)
def test_k_of_one_and_of_the_whole_vocabulary(name: str) -> None:
    dense = torch.log_softmax(2 * random_array(8, N, V), -1)
    for k in (1, V - 1):
        value, grad = errors(random_array(9, N, V), [top_k_of(dense, k), top_k_of(dense, 3)], Objective(name))
        assert value < 1e-11, k
        assert grad < 1e-9, k
    # The dense form has no tail to take the logarithm of.
    z = random_array(9, N, V).requires_grad_()
    whole = top_k_of(dense, V)
    labels, mask = torch.full((N,), NO_LABEL), torch.ones(N, dtype=torch.bool)
    loss = distillation_loss(
        z, labels, [whole], alpha=1, mask=mask, num_labels=0, num_positions=1, objective=Objective(name)
    )
    (grad_whole,) = torch.autograd.grad(loss.total, z)
    at_teacher = distillation_loss(
        dense, labels, [whole], alpha=1, mask=mask, num_labels=0, num_positions=1, objective=Objective(name)
    )
    assert torch.isfinite(grad_whole).all()
    assert grad_whole.abs().max() > 1e-3
    assert abs(at_teacher.total.item()) < 1e-12


@pytest.mark.parametrize("name", TOP_K_LOSSES)
def test_entries_of_no_mass_and_ids_that_the_student_lacks_stay_finite(name: str) -> None:
    ids = torch.tensor([[3, 7, V + 2, 2**31 - 1], [2**31 - 1, V, V, V]], dtype=torch.int32)
    logprobs = torch.tensor([[0.5, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]]).log()
    teacher = TeacherTargets(ids, logprobs, torch.tensor([0.2, 1.0]).log())
    z = random_array(10, 2, V).float().requires_grad_()
    labels, mask = torch.full((2,), NO_LABEL), torch.ones(2, dtype=torch.bool)
    other = TeacherTargets(ids[:, :1], logprobs[:, :1], torch.tensor([0.5, 1.0]).log())
    loss = distillation_loss(
        z, labels, [teacher, other], alpha=1, mask=mask, num_labels=0, num_positions=1, objective=Objective(name)
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    assert math.isfinite(loss.total.item())
    assert torch.isfinite(grad).all()
    assert grad[1].abs().max() < 1e-6, "all mass in the tail teaches nothing"


@pytest.mark.parametrize("name", TOP_K_LOSSES)
def test_a_target_that_is_no_number_makes_a_loss_that_is_none(name: str) -> None:
    (teacher, _) = two_teachers()
    teacher.logprobs[2, 1] = math.nan
    labels, mask = random_labels()
    z = random_array(11, N, V)
    loss = distillation_loss(
        z, labels, [teacher], alpha=1, mask=mask, num_labels=4, num_positions=5, objective=Objective(name)
    )
    assert math.isnan(loss.total.item())
