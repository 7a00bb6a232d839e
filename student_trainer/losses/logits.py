"""The distillation loss of logits, with a gradient that is written chunk by chunk in the forward pass.

Shape legend:  B rows, T tokens, N positions (B * T flattened), K kept ids, V student vocabulary, M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.student_trainer.losses.chunks import Positions, Shares, Sums, as_loss, check_agree, compute_dtype
from potstill.student_trainer.losses.engine import Scratch
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.losses.targets import Loss, TeacherTargets


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teachers: Sequence[TeacherTargets] = (),
    *,
    alpha: float,
    mask: Tensor,
    num_labels: float,
    num_positions: float,
    chunk_positions: int | None = None,
    objective: Objective | None = None,
) -> Loss:
    """`(1 - alpha) * CE / num_labels + alpha * sum_m weight_m * KL_m / num_positions`, with its gradient.

    `logits[t]` predict the token after token t, and so do the teachers' targets t: they align one to one.
    A row of T tokens has T - 1 labels, because the last token has no successor, and T targets. The two
    counts are of the *global* batch, over all micro-batches and ranks: then summing the returned losses
    (and gradients) of the pieces gives those of the whole.

    The gradient is made with the loss and kept in the logits' dtype until backward, which returns it; where the
    gradient of `total` is not 1, backward returns a product beside it, so put factors into the counts.

    Args:
        logits: [B, T, V] or [N, V] float; chunks are computed in float32, or float64 for float64 logits.
        labels: [B, T] or [N] int64, `NO_LABEL` where there is none.
        teachers: targets shaped like `labels`, with one more axis K for ids and logprobs.
        alpha: share of the divergence, in [0, 1]; at 0 the teachers are only measured.
        mask: bool, shaped like `labels`; False (padding) excludes a position from everything.
        num_labels: labelled positions of the global batch.
        num_positions: masked-in positions of the global batch.
        chunk_positions: positions computed at once; by default as many as fit 128 MiB of float32.
        objective: which divergence; by default the forward KL with the tail, at temperature 1.

    Raises:
        InvalidInput: alpha outside [0, 1], shapes that do not agree, or a teacher whose mass is over 1.
        UnsupportedField: a teacher lacks what the objective needs.
    """
    check_agree("logits", logits, labels, mask)
    vocab = logits.shape[-1]
    shares = Shares.of(alpha, num_labels, num_positions)
    positions = Positions.of(labels, mask, teachers, shares, objective or Objective(), vocab, chunk_positions)
    sums = Sums.of(len(teachers), logits.device)
    total = _OfLogits.apply(logits.reshape(-1, vocab), positions, sums)  # type: ignore[no-untyped-call]
    return as_loss(total, sums)


class _OfLogits(torch.autograd.Function):
    """Loss and gradient in forward; no [N, V] array but the gradient, in the logits' dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Positions, sums: Sums) -> Tensor:
        dtype, vocab = compute_dtype(logits.dtype), positions.vocab
        needed = ctx.needs_input_grad[0]
        if needed:
            ctx.gradient = torch.empty_like(logits) if positions.rows is None else torch.zeros_like(logits)
        scratch = Scratch(vocab, logits, dtype)
        for part in positions.parts():
            chosen = logits[part]
            z = scratch.take(len(chosen))
            z[:, :vocab] = chosen
            gradient = positions.turn_into_gradient(z, part, sums)
            if needed:
                ctx.gradient[part] = gradient[:, :vocab].to(logits.dtype)
        return positions.loss_of(sums, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        # Never written to: a graph that is kept may come here again.
        gradient: Tensor = ctx.gradient
        return gradient if grad_total.item() == 1.0 else gradient * grad_total, None, None
