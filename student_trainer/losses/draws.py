"""Targets from draws: N ids drawn with replacement from a teacher's whole distribution (RS-KD, arXiv 2503.16870).

A drawn id i of count c_i aims at c_i / N, and nothing else does: no tail. The mean of the gradient p - c / N over the
draws is p - t, that of the full distillation, whatever N is. Beside an exact top-k, draws that fall into it are left
out and the others keep c_i / N: the mean stays p - t, with the variance of the tail only.

The loss is the cross-entropy to the draws, whose mean is the KL plus the teacher's entropy.

Shape legend:  n positions, K kept ids, D most different ids drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_trainer.losses.targets import TeacherTargets

_NO_ID = torch.iinfo(torch.int64).max


def drawn(teacher: TeacherTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids [n, D], logs of their shares [n, D] and of no tail [n]."""
    assert teacher.drawn_ids is not None, "checked by the objective"
    assert teacher.drawn_counts is not None, "checked by the objective"
    counts = teacher.drawn_counts.double()
    shares = torch.log(counts / counts.sum(dim=-1, keepdim=True))
    return teacher.drawn_ids.long(), shares, torch.full_like(teacher.log_tail, -math.inf)


def exact_and_drawn(teacher: TeacherTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Give the top-k with the draws outside it: ids [n, K + D], logs of their shares and of no tail [n]."""
    ids, shares, no_tail = drawn(teacher)
    top = teacher.ids.long()
    twice = (ids[..., :, None] == top[..., None, :]).any(dim=-1)
    outside = ids.masked_fill(twice, _NO_ID)
    shares = shares.masked_fill(twice, -math.inf)
    return torch.cat([top, outside], dim=-1), torch.cat([teacher.logprobs.double(), shares], dim=-1), no_tail
