"""Losses and gradients over a vocabulary of more than one block of Triton's kernels, by whichever passes are chosen.

As a program, with TRITON_INTERPRET=1, it writes those of the interpreted kernels to a file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from potstill.student_trainer.losses import NO_LABEL, Objective, TeacherTargets, distillation_loss
from potstill.student_trainer.losses.rows import PLAIN, rows_for
from tests.student_trainer.losses.dense_forms import TOP_K_LOSSES, random_array, top_k_of

N, V = 3, 4096 + 300
Case = tuple[str, Tensor, list[TeacherTargets], Objective]


def two_teachers() -> list[TeacherTargets]:
    """Two teachers with two ids in common, one in each block, and others of their own."""
    common = random_array(1, N, V)
    common[:, [5, 4200]] += 6
    first, second = (torch.log_softmax(common + random_array(seed, N, V), -1) for seed in (2, 3))
    return [top_k_of(first, 7, weight=0.3), top_k_of(second, 5, weight=0.7)]


def cases() -> Iterator[Case]:
    teachers, z = two_teachers(), 2 * random_array(4, N, V)
    best = teachers[0].ids[:, :1]
    sure = z.scatter(-1, best, torch.logsumexp(z.scatter(-1, best, -math.inf), -1, keepdim=True) + 60)
    for name in TOP_K_LOSSES:
        yield name, z.float(), teachers, Objective(name)
        yield f"{name}, peaked by 60 nats", sure.float(), teachers, Objective(name)
    yield "bfloat16", z.bfloat16(), teachers, Objective()
    yield "float64", z, teachers, Objective("jsd")
    yield "labels alone", z.float(), [], Objective()
    # Two blocks of nothing but -inf, and one such block before another.
    yield "all ids", z.float(), [top_k_of(torch.log_softmax(random_array(5, N, V), -1), V)], Objective()
    falling = torch.log_softmax(random_array(6, N, V) - torch.arange(V), -1)
    yield "all ids of a block", z.float(), [top_k_of(falling, 4150)], Objective("partial")
    yield "no number", z.float().index_fill(-1, torch.tensor([4300]), math.nan), teachers, Objective()


def losses_and_gradients(*, exact: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss [] and gradient [N, V] of each case, from the same logits in float64 if `exact`."""
    labels, mask = torch.tensor([4200, NO_LABEL, 17]), torch.ones(N, dtype=torch.bool)
    found = {}
    for name, logits, teachers, objective in cases():
        z = (logits.double() if exact else logits).requires_grad_()
        loss = distillation_loss(
            z, labels, teachers, alpha=0.6, mask=mask, num_labels=2, num_positions=N, objective=objective
        ).total
        (gradient,) = torch.autograd.grad(loss, z)
        found[name] = (loss.detach(), gradient)
    return found


if __name__ == "__main__":
    assert rows_for(torch.device("cpu")) != PLAIN
    torch.save(losses_and_gradients(), Path(sys.argv[1]))
