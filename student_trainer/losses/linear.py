"""The distillation loss of hidden states: the last linear layer and the loss in chunks, without all logits.

A chunk's logits are made, turned into their gradient in place, and multiplied into the gradients of the hidden states
and of the weight before the next chunk's are made: [chunk, V] is the largest array, beside what has the weight's size.
Loss and gradients are made in forward (as Hsu et al., "Liger Kernel", arXiv 2410.10989, do for cross-entropy), so call
it within the forward of the module that has the weight: then hooks of `DistributedDataParallel` and FSDP see it.

Shape legend:  B rows, T tokens, N positions, n of one chunk, H hidden size, V student vocabulary, M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.losses.chunks import Positions, Shares, Sums, as_loss, check_agree, compute_dtype
from potstill.student_trainer.losses.engine import Scratch
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.losses.targets import Loss, TeacherTargets


@dataclass(frozen=True, slots=True)
class Logits:
    """The way from a linear layer's output y to logits: `cap * tanh(scale * y / cap)`, or `scale * y` without a cap."""

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, y: Tensor) -> Tensor:
        """Make logits of the layer's output, of any shape."""
        logits = y * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teachers: Sequence[TeacherTargets] = (),
    *,
    alpha: float,
    mask: Tensor,
    num_labels: float,
    num_positions: float,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    chunk_positions: int | None = None,
    objective: Objective | None = None,
) -> Loss:
    """`distillation_loss` of the logits `hidden @ weight.T + bias`, which are never held.

    Under autocast the products are in its dtype. The gradients are kept until backward, which can be run once.

    Args:
        hidden: [B, T, H] or [N, H] float.
        weight: [V, H] float.
        labels: [B, T] or [N] int64, as all below that is not named here: see `distillation_loss`.
        teachers: as there.
        alpha: as there.
        mask: as there; positions that it leaves out cost nothing.
        num_labels: as there.
        num_positions: as there.
        bias: [V] float.
        logits: what becomes of the products, where they are not the logits.
        chunk_positions: as there.
        objective: as there.

    Raises:
        InvalidInput, UnsupportedField: as there.
    """
    check_agree("hidden", hidden, labels, mask)
    vocab, width = weight.shape
    if hidden.shape[-1] != width or (bias is not None and bias.shape != (vocab,)):
        told = "" if bias is None else f" and bias {list(bias.shape)}"
        raise InvalidInput(f"hidden {list(hidden.shape)}, weight {list(weight.shape)}{told} do not agree")
    shares = Shares.of(alpha, num_labels, num_positions)
    positions = Positions.of(labels, mask, teachers, shares, objective or Objective(), vocab, chunk_positions)
    sums = Sums.of(len(teachers), hidden.device)
    flat = hidden.reshape(-1, width)
    total = _OfHidden.apply(flat, weight, bias, logits or Logits(), positions, sums)  # type: ignore[no-untyped-call]
    return as_loss(total, sums)


class _OfHidden(torch.autograd.Function):
    """Loss and gradients in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Logits,
        positions: Positions,
        sums: Sums,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            layer = _Layer(weight.to(dtype), None if bias is None else bias.to(dtype), logits)
            gradients = _Gradients.of(hidden, weight, bias, ctx.needs_input_grad, whole=positions.rows is None)
            scratch = Scratch(positions.vocab, hidden, compute_dtype(dtype))
            for i, part in enumerate(positions.parts()):
                h = hidden[part].to(dtype) * logits.scale
                z, slope = layer.logits_of(h, scratch)
                z = positions.turn_into_gradient(z, part, sums)[:, : positions.vocab]
                gradients.add(part, h, layer, z if slope is None else z.mul_(slope), first=i == 0)
                del slope  # before the next chunk's is made
            ctx.gradients = gradients.in_dtypes_of(weight, bias)
            return positions.loss_of(sums, compute_dtype(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise InvalidInput("a fused loss can be run backward once; call linear_distillation_loss again")
        # Handed over, not copied: what takes a gradient may keep it as it is.
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_total)
        return (*gradients, None, None, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """The linear layer in the dtype of its products."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logits: Logits

    def logits_of(self, h: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        """Make logits [n, V + 1] of scaled hidden states [n, H], and with a cap their derivative [n, V]."""
        z = scratch.take(len(h))
        inner = z[:, : len(self.weight)]
        if z.dtype == h.dtype:
            torch.mm(h, self.weight.t(), out=inner)
        else:
            inner.copy_(h @ self.weight.t())
        if self.bias is not None:
            inner.add_(self.bias, alpha=self.logits.scale)
        cap = self.logits.soft_cap
        if cap is None:
            return z, None
        slope = inner.div_(cap).tanh_().square().neg_().add_(1.0)
        inner.mul_(cap)
        return z, slope


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """Gradients that grow with each chunk; None where nobody asks for one."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H], not below float32: it is a sum over all positions
    bias: Tensor | None  # [V]

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool], *, whole: bool
    ) -> _Gradients:
        def zeros(like: Tensor | None, *, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like, dtype=compute_dtype(like.dtype)) if like is not None and wanted else None

        make = torch.empty_like if whole else torch.zeros_like
        return cls(make(hidden) if needed[0] else None, zeros(weight, wanted=needed[1]), zeros(bias, wanted=needed[2]))

    def add(self, part: slice | Tensor, h: Tensor, layer: _Layer, z: Tensor, *, first: bool) -> None:
        """Add a chunk: its scaled hidden states [n, H] and the gradient [n, V] of the layer's scaled output."""
        if self.bias is not None:
            self.bias.add_(z.sum(dim=0), alpha=layer.logits.scale)
        z = z.to(h.dtype)
        if self.hidden is not None:
            self.hidden[part] = (z @ layer.weight).mul_(layer.logits.scale).to(self.hidden.dtype)
        if self.weight is None:
            return
        if self.weight.dtype == h.dtype:
            self.weight.addmm_(z.t(), h, beta=0 if first else 1)  # 0 does not read what is not there yet
        else:
            self.weight.add_(z.t() @ h)

    def in_dtypes_of(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )
