"""The input and the output of a loss: teachers' targets as tensors, and a loss with its parts.

Shape legend:  [...] the axes of positions, K kept ids, D most different ids drawn at a position, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NO_LABEL = -100
"""The label of a position that has none; torch's own convention."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTargets:
    """One teacher's targets for a batch of positions.

    Ids at or over the student's vocabulary are not an error: their mass joins the tail.
    """

    ids: Tensor
    """[..., K] integer token ids; any order, no repeats."""
    logprobs: Tensor
    """[..., K] float, nats; -inf contributes nothing."""
    log_tail: Tensor
    """[...] float, log of the mass outside `ids`; -inf for none."""
    weight: float | Tensor = 1.0
    """Weight of this teacher's divergence, or one a position, [...]; the loss does not normalise weights."""
    drawn_ids: Tensor | None = None
    """[..., D] integer token ids that were drawn, without repeats; needed by the losses of draws."""
    drawn_counts: Tensor | None = None
    """[..., D] how often each was drawn; 0 where a position has fewer than D. A position's sum is N."""
    log_z: Tensor | None = None
    """[...] float, log of the sum of t**(1/T) over the teacher's vocabulary; needed at a temperature T other than 1."""
    entropy: Tensor | None = None
    """[...] float, nats, of the whole distribution; needed for weights by entropy."""
    label_logprob: Tensor | None = None
    """[...] float, nats, of the row's own next token, NaN where there is none; needed for weights by label."""
    alignment: Tensor | None = None
    """[..., 3] float, `Targets.alignment` of targets from another tokenizer; they weigh less by what is unresolved."""

    @property
    def resolved(self) -> Tensor:
        """[...] float: the share of what is said that is resolved; 1 where a teacher has the student's tokenizer."""
        return torch.ones_like(self.log_tail) if self.alignment is None else 1.0 - self.alignment[..., 0]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def each(self, change: Callable[[Tensor], Tensor]) -> TeacherTargets:
        """Apply `change` to every tensor, as to slice the position axes or to move it to a device."""
        values = (getattr(self, field.name) for field in fields(self))
        return TeacherTargets(*(change(value) if isinstance(value, Tensor) else value for value in values))


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """The loss of one call and its parts. Only `total` carries a gradient."""

    total: Tensor
    """[] the mixed loss over the given counts, in the logits' compute dtype."""
    ce_sum: Tensor
    """[] float64, nats, summed over labelled positions, not divided."""
    kl_sums: Tensor
    """[M] float64, nats: each teacher's divergence summed over masked-in positions, each by what is resolved of it; not
    divided, and without the teacher's weight."""
    distilled_sum: Tensor
    """[] float64: what alpha multiplies in `total`, with weights and temperature, not divided."""
    alm_sum: Tensor
    """[] float64: what `Objective.alm` multiplies in `total`, with weights, not divided."""
