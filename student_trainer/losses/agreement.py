"""Nearness of a student to a teacher at each position, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.student_trainer.losses.chunks import compute_dtype
from potstill.student_trainer.losses.divergences import forward_kl
from potstill.student_trainer.losses.engine import Scratch, compare
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.losses.targets import TeacherTargets


def kl_and_overlap(logits: Tensor, teacher: TeacherTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each position, without gradient: KL to the teacher, agreement and the student's mass on its top-k.

    Args:
        logits: [N, V] float.
        teacher: targets of N positions.

    Returns:
        KL [N] float32 nats; bool [N], true where both have the same most likely id; the student's mass on the
        teacher's top-k, float32 [N].
    """
    with torch.no_grad():
        vocab, dtype = logits.shape[-1], compute_dtype(logits.dtype)
        best = logits.argmax(dim=-1)
        z = Scratch(vocab, logits, dtype).take(len(logits))
        z[:, :vocab] = logits
        aim, _ = Objective().aim(teacher, vocab, z.new_ones(len(z)))
        on = compare(z, aim)
        theirs = teacher.ids.gather(-1, teacher.logprobs.argmax(dim=-1, keepdim=True)).squeeze(-1)
        return forward_kl(on).value, best == theirs, on.p.sum(dim=-1).clamp(max=1.0)
