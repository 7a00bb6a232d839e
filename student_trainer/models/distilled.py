"""A student with its loss, as one module: what `DistributedDataParallel` or FSDP wraps.

The last linear layer is fused with the loss where that is the same: its class is `nn.Linear`, it sees what the model
below it gives, and its output becomes logits by a factor and a soft cap or not at all. This is tried, not taken from
the model's name. Else the loss takes the logits, which are then held.

Shape legend:  B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.student_trainer.losses import (
    Logits,
    Loss,
    Objective,
    TeacherTargets,
    distillation_loss,
    linear_distillation_loss,
)
from potstill.student_trainer.models.precision import autocast

_NEAR = 1e-5
"""Relative difference, between two ways to the same numbers, that is rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class _Fused:
    """A student's parts, where its last layer can be fused with the loss."""

    base: nn.Module
    head: nn.Linear
    logits: Logits


class Distilled(nn.Module):
    """A student whose forward pass gives its loss."""

    def __init__(self, student: PreTrainedModel, dtype: str, objective: Objective, *, fused: bool = True) -> None:
        """Take a student that has its weights.

        Args:
            student: a causal language model.
            dtype: of the forward pass, `float32` or `bfloat16`.
            objective: the divergence from teachers.
            fused: False to hold the logits even where they need not be.
        """
        super().__init__()
        self.student, self.dtype, self.objective = student, dtype, objective
        self._fused = _fused_parts(student) if fused else None

    @property
    def fused(self) -> bool:
        """True if no logits are held."""
        return self._fused is not None

    def forward(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        mask: Tensor,
        teachers: Sequence[TeacherTargets],
        *,
        alpha: float,
        num_labels: float,
        num_positions: float,
    ) -> tuple[Loss, Any]:
        """Compute the loss of rows [B, T]; see `distillation_loss`. `inputs` are those of the student's forward pass.

        Returns:
            The loss, and the logits of the routers of a student with experts that gives them, [B * T, E] a layer.
        """
        settings: dict[str, Any] = {"alpha": alpha, "mask": mask, "objective": self.objective}
        settings |= {"num_labels": num_labels, "num_positions": num_positions}
        with autocast(labels.device, self.dtype):
            if self._fused is None:
                out = self.student(**inputs)
            else:
                out = self._fused.base(**inputs)
                weight, bias = self._fused.head.weight, self._fused.head.bias
                settings |= {"bias": bias, "logits": self._fused.logits}
                loss = linear_distillation_loss(out.last_hidden_state, weight, labels, teachers, **settings)
                return loss, getattr(out, "router_logits", None)
        return distillation_loss(out.logits, labels, teachers, **settings), getattr(out, "router_logits", None)


def _fused_parts(student: PreTrainedModel) -> _Fused | None:
    """Find the parts of a student, and try that they give what it gives; None if they do not."""
    head, base = student.get_output_embeddings(), student.base_model
    if type(head) is not nn.Linear or base is student:
        return None
    config = student.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    logits = Logits(scale, getattr(config, "final_logit_softcapping", None))
    most = min(6, getattr(config, "max_position_embeddings", None) or 6)
    tokens = torch.arange(most, device=head.weight.device).remainder(config.vocab_size)[None]
    # So large and spread that every cap and factor shows.
    probe = torch.linspace(-200.0, 200.0, head.out_features, device=tokens.device).expand(1, most, -1).contiguous()
    seen: list[Tensor] = []
    below: list[Any] = []

    def replaced(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
        # Here in the student's forward pass all of its own weights are together, where workers share them.
        below.append(base(input_ids=tokens, use_cache=False))
        seen.append(inputs[0])
        return probe

    with _trying(student):
        hook = head.register_forward_hook(replaced)
        try:
            out = student(input_ids=tokens, use_cache=False)
        finally:
            hook.remove()
    if len(seen) != 1:
        return None
    hidden = getattr(below[0], "last_hidden_state", None)
    if getattr(out, "router_logits", None) is not None and getattr(below[0], "router_logits", None) is None:
        return None
    same = _near(hidden, seen[0]) and _near(out.logits, logits(probe))
    return _Fused(base, head, logits) if same else None


def _near(ours: Tensor | None, theirs: Tensor) -> bool:
    if ours is None or ours.shape != theirs.shape:
        return False
    return bool((ours.float() - theirs.float()).abs().max() <= _NEAR * theirs.float().abs().max())


@contextmanager
def _trying(student: PreTrainedModel) -> Iterator[None]:
    training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(training)
