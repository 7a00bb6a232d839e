"""Losses from teachers with another tokenizer: less weight where little is resolved, and likelihoods of chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.student_trainer.losses import (
    NO_LABEL,
    Loss,
    Objective,
    TeacherTargets,
    distillation_loss,
    linear_distillation_loss,
)
from potstill.student_trainer.losses.mix import distils_at
from potstill.student_trainer.losses.settings import LossConfig

VOCAB, ALPHA, ALM = 23, 0.4, 0.7
B, T, K = 3, 11, 4
CHUNKS = [{0: 1, 3: 3, 5: 1, 9: 4}, {2: 3, 4: 1}, {6: 7}]
"""In each row, how many tokens the chunk has that ends with a position's label."""


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TeacherTargets, TeacherTargets]:
    """Logits, labels, mask, a teacher of the student's tokenizer, and one of another."""
    torch.manual_seed(seed)
    logits = torch.randn(B, T, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (B, T))
    mask = torch.ones(B, T, dtype=torch.bool)
    labels[:, -1] = NO_LABEL
    labels[0, 7] = NO_LABEL  # within a chunk
    mask[1, 6:] = False
    labels[1, 6:] = NO_LABEL

    def teacher() -> TeacherTargets:
        dense = log_softmax(torch.randn(B, T, VOCAB, dtype=torch.float64), dim=-1)
        top = dense.topk(K, dim=-1)
        return TeacherTargets(top.indices, top.values, torch.log1p(-top.values.exp().sum(dim=-1)), weight=0.5)

    alignment = torch.zeros(B, T, 3, dtype=torch.float64)
    projected = teacher()
    alignment[..., 0] = torch.rand(B, T) * projected.log_tail.exp()
    for row, chunks in enumerate(CHUNKS):
        for end, tokens in chunks.items():
            alignment[row, end, 1:] = torch.tensor([-3.0 * tokens * (row + 1), float(tokens)])
    return logits, labels, mask, teacher(), replace(projected, alignment=alignment)


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies [B, T]; 0 where there is no label."""
    flat = logits.reshape(-1, VOCAB), labels.reshape(-1)
    return cross_entropy(*flat, ignore_index=NO_LABEL, reduction="none").view(B, T)


def plainly(logits: Tensor, labels: Tensor, mask: Tensor, own: TeacherTargets, other: TeacherTargets) -> Tensor:
    """The loss over dense arrays, in float64."""
    assert other.alignment is not None
    num_labels, num_positions = (labels != NO_LABEL).sum(), mask.sum()
    log_p = log_softmax(logits, dim=-1)
    ce = cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=NO_LABEL, reduction="none").view(
        B, T
    )
    total = (1 - ALPHA) * ce.sum() / num_labels
    unresolved = other.alignment[..., 0]
    for teacher, lost, weight in ((own, torch.zeros(B, T), 0.5), (other, unresolved, 0.5 * (1 - unresolved))):
        kept = log_p.gather(-1, teacher.ids)
        p = torch.cat([kept, torch.log1p(-kept.exp().sum(dim=-1, keepdim=True))], dim=-1)
        rest = (teacher.log_tail.exp() - lost)[..., None]
        t = torch.cat([teacher.logprobs.exp(), rest], dim=-1)
        t = t / t.sum(dim=-1, keepdim=True)
        kl = (t * (t.log() - p)).sum(dim=-1)
        total = total + ALPHA * (weight * kl)[mask].sum() / num_positions
    for row, chunks in enumerate(CHUNKS):
        for end, tokens in chunks.items():
            begin = end + 1 - tokens
            if (labels[row, begin : end + 1] == NO_LABEL).any():
                continue
            a = other.alignment[row, end, 1] / 100 - 1e-6
            b = -ce[row, begin : end + 1].sum() / 100 - 1e-6
            apart = a.exp() * (a - b) + (1 - a.exp()) * (torch.log(-torch.expm1(a)) - torch.log(-torch.expm1(b)))
            total = total + ALM * 0.5 * 100 * apart / num_labels
    return total


def ours(
    logits: Tensor, labels: Tensor, mask: Tensor, *teachers: TeacherTargets, chunk: int | None = None, alm: float = ALM
) -> Loss:
    return distillation_loss(
        logits,
        labels,
        teachers,
        alpha=ALPHA,
        mask=mask,
        num_labels=int((labels != NO_LABEL).sum()),
        num_positions=int(mask.sum()),
        chunk_positions=chunk,
        objective=Objective(alm=alm),
    )


@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
def test_loss_and_gradient_are_those_of_dense_arrays(chunk: int | None) -> None:
    """However positions are computed: a part never ends within a chunk."""
    logits, labels, mask, own, other = made()
    wanted_logits, own_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    wanted = plainly(wanted_logits, labels, mask, own, other)
    wanted.backward()  # type: ignore[no-untyped-call]
    loss = ours(own_logits, labels, mask, own, other, chunk=chunk)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert wanted_logits.grad is not None
    assert own_logits.grad is not None
    torch.testing.assert_close(loss.total, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(own_logits.grad, wanted_logits.grad, rtol=0, atol=1e-12)
    assert loss.alm_sum > 0


def test_the_fused_layer_has_the_same() -> None:
    """From hidden states, in parts."""
    logits, labels, mask, own, other = made()
    hidden = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 6, dtype=torch.float64)
    wanted = plainly(hidden @ weight.T, labels, mask, own, other)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    loss = linear_distillation_loss(
        hidden,
        weight,
        labels,
        [own, other],
        alpha=ALPHA,
        mask=mask,
        num_labels=int((labels != NO_LABEL).sum()),
        num_positions=int(mask.sum()),
        chunk_positions=3,
        objective=Objective(alm=ALM),
    )
    loss.total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.total, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=0, atol=1e-11)
    assert logits.shape == (B, T, VOCAB)


def test_a_student_that_agrees_has_no_chunk_loss() -> None:
    """Then every chunk's likelihood is the teacher's."""
    logits, labels, mask, own, other = made()
    ce = cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=NO_LABEL, reduction="none").view(
        B, T
    )
    assert other.alignment is not None
    alignment = torch.zeros_like(other.alignment)
    for row, chunks in enumerate(CHUNKS):
        for end, tokens in chunks.items():
            alignment[row, end, 1:] = torch.tensor([-ce[row, end + 1 - tokens : end + 1].sum(), tokens])
    assert ours(logits, labels, mask, own, replace(other, alignment=alignment)).alm_sum < 1e-9


def test_a_certain_student_keeps_a_finite_gradient() -> None:
    """Both at a probability of one, and a student far from a certain teacher."""
    _, labels, mask, own, other = made()
    logits = torch.zeros(B, T, VOCAB)
    logits.scatter_(-1, labels.clamp(min=0)[..., None], 80.0)
    for sign in (1.0, -1.0):
        given = (sign * logits).requires_grad_()
        loss = ours(given, labels, mask, own, other)
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert given.grad is not None
        assert given.grad.isfinite().all()
        assert loss.total.isfinite()


def test_what_goes_with_it() -> None:
    """It needs a teacher with chunks and one weight a teacher; with a weight of 0 nothing of it is computed."""
    logits, labels, mask, own, other = made()
    with pytest.raises(UnsupportedField, match="alm needs a teacher whose targets `potstill project` made"):
        ours(logits, labels, mask, own)
    with pytest.raises(InvalidInput, match="alm takes one weight a teacher"):
        ours(logits, labels, mask, own, replace(other, weight=torch.ones(B, T)))
    with pytest.raises(InvalidInput, match="alm is -1.0; it must be a number of at least 0"):
        Objective(alm=-1.0)
    with pytest.raises(ValidationError, match="alm does not go with weighting 'label'"):
        LossConfig(alm=0.1, weighting="label")
    assert ours(logits, labels, mask, own, other, alm=0.0).alm_sum == 0


def test_micro_batch_without_rows() -> None:
    """A worker that gets no rows of a step goes on: its batch has no targets, and so no alignment."""
    logits, labels, _, _, other = made()
    empty = replace(other, alignment=None)
    nothing = torch.zeros(B, T, dtype=torch.bool)
    assert ours(logits, torch.full_like(labels, NO_LABEL), nothing, empty).alm_sum == 0


def test_steps_that_read_targets() -> None:
    """Those of alpha over 0, and with alm all; none between those of `distil_every`."""
    assert [distils_at(LossConfig(alpha=((0, 0.0), (4, 1.0)), distil_every=2), step) for step in range(5)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert distils_at(LossConfig(alpha=0.0, alm=0.1), 1)
    assert LossConfig(alpha=0.0, alm=0.1).distils
    assert not distils_at(LossConfig(alpha=0.0), 0)
