"""The losses against dense float64 forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.losses import MIN_TAIL_MASS, NO_LABEL, TeacherTargets, distillation_loss, kl_and_overlap
from tests.support.fakes import FakeTeacher, fake_identity

B, T, V, K = 2, 5, 23, 6


def random_logits(seed: int, *shape: int) -> Tensor:
    """Standard normal float64, the same on every machine: torch's own depend on what its CPU can do."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_targets(seed: int, *, k: int = K, vocab: int = V, weight: float = 1.0) -> tuple[TeacherTargets, Tensor]:
    """Top-k targets of a random dense float64 distribution, and that distribution."""
    dense = torch.log_softmax(3 * random_logits(seed, B, T, vocab), -1)
    logprobs, ids = dense.topk(k, -1)
    tail = (1 - logprobs.exp().sum(-1)).clamp(min=0)
    log_tail = torch.where(tail > 1e-12, tail.log(), -math.inf)
    return TeacherTargets(ids, logprobs, log_tail, weight), dense


def dense_kl(z: Tensor, targets: TeacherTargets) -> Tensor:
    """Top-k + tail KL per position, the plain way in float64, differentiable by autograd."""
    log_p = torch.log_softmax(z.double(), -1)
    in_k = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, targets.ids.long(), True)
    kept = targets.logprobs.exp() * (targets.logprobs - log_p.gather(-1, targets.ids.long()))
    log_p_r = torch.logsumexp(log_p.masked_fill(in_k, -math.inf), -1)
    r = targets.log_tail.exp()
    tail = torch.where(r > MIN_TAIL_MASS, r * (targets.log_tail - log_p_r), 0.0)
    return torch.where(targets.logprobs > -math.inf, kept, 0.0).sum(-1) + tail


def random_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * random_logits(seed, B, T, V)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, V, (B, T)))
    labels[:, -1] = NO_LABEL
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:] = False
    labels[1, 2:] = NO_LABEL
    return logits, labels, mask


def reference(
    z: Tensor,
    labels: Tensor,
    mask: Tensor,
    teachers: list[TeacherTargets],
    alpha: float,
    nl: float,
    np_: float,
) -> Tensor:
    ce = torch.nn.functional.cross_entropy(z.reshape(-1, V), labels.reshape(-1), ignore_index=NO_LABEL, reduction="sum")
    kl = sum((t.weight * (dense_kl(z, t) * mask).sum() for t in teachers), torch.zeros((), dtype=torch.float64))
    return (1 - alpha) * ce / nl + alpha * kl / np_


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_value_and_gradient_equal_the_dense_form(alpha: float, chunk: int | None) -> None:
    logits, labels, mask = random_batch()
    teachers = [random_targets(1, weight=0.25)[0], random_targets(2, k=3, weight=0.75)[0]]
    z = logits.clone().requires_grad_()
    expected = reference(z, labels, mask, teachers, alpha, 7.0, 9.0)
    (expected_grad,) = torch.autograd.grad(expected, z)
    z = logits.clone().requires_grad_()
    loss = distillation_loss(
        z, labels, teachers, alpha=alpha, mask=mask, num_labels=7, num_positions=9, chunk_positions=chunk
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)
    assert loss.kl_sums.tolist() == pytest.approx([(dense_kl(z, t) * mask).sum().item() for t in teachers])


def test_gradcheck() -> None:
    logits, labels, mask = random_batch(3)
    teachers = [random_targets(4, weight=0.4)[0], random_targets(5, k=2, weight=0.6)[0]]

    def total(z: Tensor) -> Tensor:
        return distillation_loss(
            z, labels, teachers, alpha=0.6, mask=mask, num_labels=7, num_positions=8, chunk_positions=4
        ).total

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(),), fast_mode=False)


def kl_gradient(z: Tensor, *teachers: TeacherTargets) -> Tensor:
    z = z.clone().requires_grad_()
    labels = torch.full(z.shape[:-1], NO_LABEL)
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    loss = distillation_loss(z, labels, teachers, alpha=1.0, mask=mask, num_labels=0, num_positions=1)
    (grad,) = torch.autograd.grad(loss.total, z)
    return grad


def test_gradient_is_the_published_formula() -> None:
    """p - t on K, p (1 - r / p_r) elsewhere."""
    logits, _, _ = random_batch(6)
    targets, _ = random_targets(7)
    p = torch.softmax(logits, -1)
    in_k = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, targets.ids, True)
    t = torch.zeros_like(p).scatter_(-1, targets.ids, targets.logprobs.exp())
    r = targets.log_tail.exp()[..., None]
    p_r = (p * ~in_k).sum(-1, keepdim=True)
    torch.testing.assert_close(kl_gradient(logits, targets), torch.where(in_k, p - t, p * (1 - r / p_r)))


def test_the_gradient_vanishes_where_student_and_teacher_agree() -> None:
    targets, dense = random_targets(8)
    assert kl_gradient(dense, targets).abs().max() < 1e-12


def test_weighted_kls_have_the_gradient_of_the_kl_to_the_mixture_on_dense_support() -> None:
    logits, _, _ = random_batch(9)
    (first, a), (second, b) = random_targets(10, k=V, weight=0.3), random_targets(11, k=V, weight=0.7)
    mixture = torch.log(0.3 * a.exp() + 0.7 * b.exp())
    ids = torch.arange(V).expand(B, T, V)
    merged = TeacherTargets(ids, mixture, torch.full((B, T), -math.inf, dtype=torch.float64))
    torch.testing.assert_close(kl_gradient(logits, first, second), kl_gradient(logits, merged))


def test_full_support_is_the_plain_forward_kl() -> None:
    logits, labels, mask = random_batch(12)
    targets, dense = random_targets(13, k=V)
    loss = distillation_loss(logits, labels, [targets], alpha=1, mask=mask, num_labels=1, num_positions=1)
    full = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), dense, reduction="none", log_target=True).sum(-1)
    assert loss.total.item() == pytest.approx((full * mask).sum().item())


def one_position(ids: list[int], logprobs: list[float], log_tail: float) -> TeacherTargets:
    return TeacherTargets(torch.tensor([ids]), torch.tensor([logprobs], dtype=torch.float32), torch.tensor([log_tail]))


def kl_of(z: Tensor, targets: TeacherTargets) -> tuple[float, Tensor]:
    z = z.clone().requires_grad_()
    loss = distillation_loss(
        z,
        torch.full((1,), NO_LABEL),
        [targets],
        alpha=1,
        mask=torch.ones(1, dtype=torch.bool),
        num_labels=0,
        num_positions=1,
    )
    (grad,) = torch.autograd.grad(loss.total, z)
    return loss.total.item(), grad


def test_a_tail_of_zero_contributes_exactly_zero() -> None:
    z = random_logits(14, 1, V).float()
    for log_tail in (-math.inf, math.log(1e-7)):
        value, grad = kl_of(z, one_position([3, 1], [math.log(0.75), math.log(0.25)], log_tail))
        log_p = torch.log_softmax(z.double(), -1)[0]
        expected = 0.75 * (math.log(0.75) - log_p[3]) + 0.25 * (math.log(0.25) - log_p[1])
        assert value == pytest.approx(expected.item(), rel=1e-6)
        outside = [i for i in range(V) if i not in {1, 3}]
        torch.testing.assert_close(grad[0, outside], torch.softmax(z, -1)[0, outside])


def test_a_float32_top_k_that_sums_to_more_than_one_is_harmless() -> None:
    logprobs = np.log(np.array([0.99999994, 1.2e-7, 5e-8], dtype=np.float32))
    assert np.exp(logprobs).sum() > 1
    value, grad = kl_of(torch.zeros(1, V), one_position([5, 2, 9], logprobs.tolist(), -math.inf))
    assert value == pytest.approx(math.log(V), rel=1e-5)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("others", [-3.0, -6.0, -18.0, -40.0, -120.0])
def test_a_peaked_student_keeps_an_exact_tail(others: float) -> None:
    """1 - sum(p) would cancel to zero in float32, and p itself underflows; value and gradient stay exact."""
    z = torch.full((1, V), others)
    z[0, 4] = 0.0
    targets = one_position([4], [math.log(0.9)], math.log(0.1))
    value, grad = kl_of(z, targets)
    exact = TeacherTargets(targets.ids[None], targets.logprobs[None].double(), targets.log_tail[None].double())
    assert value == pytest.approx(dense_kl(z[None], exact).item(), rel=1e-6, abs=3e-7)
    tail = grad[0, [i for i in range(V) if i != 4]]
    mass = (V - 1) * math.exp(others) / (1 + (V - 1) * math.exp(others))
    torch.testing.assert_close(tail, torch.full_like(tail, (mass - 0.1) / (V - 1)), rtol=1e-5, atol=1e-7)


def test_a_peaked_teacher_and_entries_of_zero_mass() -> None:
    z = random_logits(15, 1, V).float()
    value, grad = kl_of(z, one_position([7, 8, 0], [0.0, -math.inf, -math.inf], -math.inf))
    assert value == pytest.approx(-torch.log_softmax(z, -1)[0, 7].item(), rel=1e-6)
    expected = torch.softmax(z, -1)
    expected[0, 7] -= 1
    torch.testing.assert_close(grad, expected)


def test_ids_that_the_student_lacks_join_the_tail() -> None:
    z = random_logits(16, 1, V).float()
    beyond = one_position([3, V + 4, V, 1], [math.log(x) for x in (0.4, 0.2, 0.1, 0.1)], math.log(0.2))
    folded = one_position([3, 1], [math.log(0.4), math.log(0.1)], math.log(0.5))
    (value, grad), (expected, expected_grad) = kl_of(z, beyond), kl_of(z, folded)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad, expected_grad)
    for ours, theirs in zip(kl_and_overlap(z, beyond), kl_and_overlap(z, folded), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_student_with_more_ids_than_the_teacher() -> None:
    logits = random_logits(17, B, T, V + 9)
    targets, _ = random_targets(18)
    labels, mask = torch.full((B, T), NO_LABEL), torch.ones(B, T, dtype=torch.bool)
    loss = distillation_loss(logits, labels, [targets], alpha=1, mask=mask, num_labels=0, num_positions=1)
    assert loss.total.item() == pytest.approx(dense_kl(logits, targets).sum().item())


def test_a_tail_where_the_top_k_covers_the_students_vocabulary_is_dropped() -> None:
    ids, logprobs = [0, 1, 2], [math.log(0.5), math.log(0.3), math.log(0.1)]
    value, grad = kl_of(torch.zeros(1, 3), one_position(ids, logprobs, math.log(0.1)))
    assert value == pytest.approx(sum(math.exp(x) * (x + math.log(3)) for x in logprobs), rel=1e-6)
    assert torch.isfinite(grad).all()


def test_masked_positions_get_no_gradient_and_their_targets_do_not_matter() -> None:
    logits, labels, mask = random_batch(19)
    targets, _ = random_targets(20)
    targets.ids[~mask] = 10**6
    targets.logprobs[~mask] = -math.inf
    targets.log_tail[~mask] = -math.inf
    z = logits.requires_grad_()
    loss = distillation_loss(z, labels, [targets], alpha=0.5, mask=mask, num_labels=5, num_positions=5)
    (grad,) = torch.autograd.grad(loss.total, z)
    assert (grad[~mask] == 0).all()
    assert torch.isfinite(loss.total)


def test_micro_batches_add_up_to_the_whole() -> None:
    logits, labels, mask = random_batch(21)
    targets, _ = random_targets(22)
    z = logits.requires_grad_()

    def loss_of(rows: slice) -> Tensor:
        part = TeacherTargets(targets.ids[rows], targets.logprobs[rows], targets.log_tail[rows])
        return distillation_loss(
            z[rows], labels[rows], [part], alpha=0.5, mask=mask[rows], num_labels=6, num_positions=8
        ).total

    whole = torch.autograd.grad(loss_of(slice(None)), z)[0]
    pieces = torch.autograd.grad(loss_of(slice(0, 1)) + loss_of(slice(1, 2)), z)[0]
    torch.testing.assert_close(whole, pieces)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    logits, labels, mask = random_batch(23)
    targets, _ = random_targets(24)
    z = logits.bfloat16().requires_grad_()
    loss = distillation_loss(z, labels, [targets], alpha=0.5, mask=mask, num_labels=6, num_positions=8)
    loss.total.backward()  # type: ignore[no-untyped-call]
    expected = reference(z.detach().double(), labels, mask, [targets], 0.5, 6, 8)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16


def test_measures_against_a_teacher() -> None:
    teacher = FakeTeacher(fake_identity(vocab_size=V))
    row = np.arange(7, dtype=np.uint32)
    answer = teacher.distribution(row, K)
    targets = TeacherTargets(
        torch.from_numpy(answer.ids.astype(np.int64)),
        torch.from_numpy(answer.logprobs),
        torch.from_numpy(answer.log_tail),
    )
    perfect = torch.from_numpy(teacher.dense_logprobs(row)).float()
    kl, agree, mass = kl_and_overlap(perfect, targets)
    assert kl.abs().max() < 1e-5
    assert agree.all()
    torch.testing.assert_close(mass, targets.logprobs.exp().sum(-1))
    _, agree, _ = kl_and_overlap(-perfect, targets)
    assert not agree.any()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    logits, labels, mask = random_batch()
    with pytest.raises(InvalidInput, match="alpha"):
        distillation_loss(logits, labels, alpha=alpha, mask=mask, num_labels=1, num_positions=1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, labels, mask = random_batch()
    with pytest.raises(InvalidInput, match="do not agree"):
        distillation_loss(logits[:, 1:], labels, alpha=0.0, mask=mask, num_labels=1, num_positions=1)
    whole, _ = random_targets(0)
    targets = TeacherTargets(whole.ids[:, 1:], whole.logprobs[:, 1:], whole.log_tail[:, 1:])
    with pytest.raises(InvalidInput, match="teacher 0"):
        distillation_loss(logits, labels, [targets], alpha=0.5, mask=mask, num_labels=1, num_positions=1)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest float32 array that any operation makes."""

    def __init__(self, ignored: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignored = ignored
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.shape != self.ignored:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_float32_array_is_larger_than_a_chunk() -> None:
    rows, chunk = 64, 4
    logits = random_logits(26, rows, V).bfloat16().requires_grad_()
    targets, _ = random_targets(25)
    few = TeacherTargets(
        targets.ids.flatten(0, 1).repeat(7, 1)[:rows],
        targets.logprobs.flatten(0, 1).repeat(7, 1)[:rows].float(),
        targets.log_tail.flatten().repeat(7)[:rows].float(),
    )
    labels, mask = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    with _Largest(ignored=few.ids.shape) as largest:
        loss = distillation_loss(
            logits,
            labels,
            [few],
            alpha=0.5,
            mask=mask,
            num_labels=rows,
            num_positions=rows,
            chunk_positions=chunk,
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
    assert 0 < largest.elements <= chunk * (V + 1)
