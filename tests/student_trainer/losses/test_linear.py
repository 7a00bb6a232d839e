"""The fused linear layer and loss against the layer, the dense loss and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.live_arrays import LiveArrays
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.losses import (
    NO_LABEL,
    Logits,
    Objective,
    TeacherTargets,
    distillation_loss,
    linear_distillation_loss,
)
from tests.student_trainer.losses.dense_forms import TOP_K_LOSSES, dense_loss, random_array, top_k_of

B, T, H, V = 2, 5, 7, 33
COUNTS: dict[str, Any] = {"num_labels": 7, "num_positions": 8}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def batch() -> tuple[Tensor, Tensor, list[TeacherTargets]]:
    labels = torch.arange(B * T).reshape(B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:] = False
    labels[:, -1] = labels[1, 2:] = NO_LABEL
    common = random_array(0, B, T, V)
    denses = [torch.log_softmax(common + random_array(seed, B, T, V), -1) for seed in (1, 2)]
    return labels, mask, [top_k_of(denses[0], 6, weight=0.4), top_k_of(denses[1], 4, weight=0.6)]


def layer(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias, as leaves."""
    arrays = (random_array(3, B, T, H), random_array(4, V, H), random_array(5, V))
    return [array.to(dtype).requires_grad_() for array in arrays]


def gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [grad.double() for grad in torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", TOP_K_LOSSES)
@pytest.mark.parametrize("logits", [Logits(), Logits(scale=0.5, soft_cap=3.0)])
def test_it_is_the_dense_form(name: str, dtype: torch.dtype, logits: Logits) -> None:
    labels, mask, teachers = batch()
    hidden, weight, bias = leaves = layer(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = logits(exact[0] @ exact[1].t() + exact[2])
    expected = dense_loss(z, labels, mask, teachers, Objective(name), alpha=0.6, **COUNTS)
    loss = linear_distillation_loss(
        hidden,
        weight,
        labels,
        teachers,
        alpha=0.6,
        mask=mask,
        bias=bias,
        logits=logits,
        chunk_positions=3,
        objective=Objective(name),
        **COUNTS,
    )
    assert loss.total.item() == pytest.approx(expected.item(), rel=max(BOUNDS[dtype], 1e-12))
    for ours, theirs in zip(gradients(loss.total, leaves), gradients(expected, exact), strict=True):
        # In bfloat16 the logits are rounded, and so is what they are multiplied with: two roundings of 2**-9.
        assert (ours - theirs).abs().max() < 2 * BOUNDS[dtype] * theirs.abs().max()


def test_at_another_temperature_and_without_teachers() -> None:
    labels, mask, teachers = batch()
    log_z = [torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).abs() + 1 for _ in "ab"]
    warm = [
        TeacherTargets(t.ids, t.logprobs, t.log_tail, t.weight, log_z=z) for t, z in zip(teachers, log_z, strict=True)
    ]
    for those, objective, alpha in ((warm, Objective(temperature=2.0), 0.5), ([], Objective(), 0.0)):
        hidden, weight, bias = leaves = layer(torch.float64)
        settings: Any = {"alpha": alpha, "mask": mask, "objective": objective, **COUNTS}
        fused = linear_distillation_loss(hidden, weight, labels, those, bias=bias, chunk_positions=3, **settings)
        plain = distillation_loss(hidden @ weight.t() + bias, labels, those, **settings)
        assert fused.total.item() == pytest.approx(plain.total.item(), rel=1e-13)
        for ours, theirs in zip(gradients(fused.total, leaves), gradients(plain.total, leaves), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_the_weights() -> None:
    labels, mask, teachers = batch()
    hidden, weight, _ = leaves = layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = linear_distillation_loss(hidden, weight, labels, teachers, alpha=0.6, mask=mask, **COUNTS)
        plain = distillation_loss(
            torch.nn.functional.linear(hidden, weight), labels, teachers, alpha=0.6, mask=mask, **COUNTS
        )
    assert fused.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(fused.total, leaves[:2]), torch.autograd.grad(plain.total, leaves[:2]), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_the_gradient_of_the_loss_multiplies_them() -> None:
    labels, mask, teachers = batch()

    def grads(factor: float) -> list[Tensor]:
        hidden, weight, _ = leaves = layer(torch.float64)
        loss = linear_distillation_loss(hidden, weight, labels, teachers, alpha=0.6, mask=mask, **COUNTS)
        return gradients(factor * loss.total, leaves[:2])

    for once, thrice in zip(grads(1.0), grads(3.0), strict=True):
        torch.testing.assert_close(3 * once, thrice)


def test_backward_runs_once() -> None:
    labels, mask, teachers = batch()
    hidden, weight, _ = layer(torch.float32)
    total = linear_distillation_loss(hidden, weight, labels, teachers, alpha=0.6, mask=mask, **COUNTS).total
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(InvalidInput, match="a fused loss can be run backward once"):
        total.backward()  # type: ignore[no-untyped-call]


def test_a_frozen_weight_has_no_gradient() -> None:
    labels, mask, teachers = batch()
    hidden, weight, _ = layer(torch.float32)
    weight = weight.detach()
    linear_distillation_loss(hidden, weight, labels, teachers, alpha=0.6, mask=mask, **COUNTS).total.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    labels, mask, _ = batch()
    hidden, weight, bias = layer(torch.float32)
    with pytest.raises(InvalidInput, match=r"hidden \[2, 5, 7\], weight \[33, 6\] do not agree"):
        linear_distillation_loss(hidden, weight[:, 1:], labels, alpha=0.0, mask=mask, **COUNTS)
    with pytest.raises(InvalidInput, match=r"weight \[33, 7\] and bias \[32\] do not agree"):
        linear_distillation_loss(hidden, weight, labels, alpha=0.0, mask=mask, bias=bias[1:], **COUNTS)
    with pytest.raises(InvalidInput, match=r"hidden \[1, 5, 7\], labels \[2, 5\]"):
        linear_distillation_loss(hidden[1:], weight, labels, alpha=0.0, mask=mask, **COUNTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how_many", [0, 1, 2])
@pytest.mark.parametrize("logits", [Logits(), Logits(soft_cap=30.0)])
def test_no_array_is_as_large_as_the_logits(dtype: torch.dtype, how_many: int, logits: Logits) -> None:
    rows, width, vocab, chunk, k = 96, 8, 512, 4, 6
    hidden = random_array(6, rows, width).to(dtype).requires_grad_()
    weight = random_array(7, vocab, width).to(dtype).requires_grad_()
    teachers = [top_k_of(torch.log_softmax(random_array(seed, rows, vocab), -1), k) for seed in range(8, 8 + how_many)]
    teachers = [t.each(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor) for t in teachers]
    labels, mask = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    with LiveArrays() as live:
        loss = linear_distillation_loss(
            hidden,
            weight,
            labels,
            teachers,
            alpha=0.5 if how_many else 0.0,
            mask=mask,
            num_labels=rows,
            num_positions=rows,
            logits=logits,
            chunk_positions=chunk,
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
    # Logits have a column more than the vocabulary, and their derivative by a cap has not.
    large = [live.most(elements=chunk * columns, dtype=torch.float32) for columns in (vocab + 1, vocab)]
    assert 1 <= sum(large) <= 2
    assert live.largest <= max(weight.numel(), rows * k)
    assert live.largest < rows * vocab // 10
