"""Targets of whole distributions, as of a live teacher or the dense field of a small cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_trainer.losses.targets import TeacherTargets


def dense_targets(logprobs: Tensor, weight: float | Tensor = 1.0) -> TeacherTargets:
    """Make targets whose K is all of the vocabulary, for any loss of a top-k.

    Chunks are then as much smaller as their small arrays are larger. Where the student has fewer ids than the teacher,
    the mass of the others joins the tail, as always.

    Args:
        logprobs: [..., V] float, nats.
        weight: as of `TeacherTargets`.
    """
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device).expand(logprobs.shape)
    return TeacherTargets(ids, logprobs, logprobs.new_full(logprobs.shape[:-1], -math.inf), weight)
