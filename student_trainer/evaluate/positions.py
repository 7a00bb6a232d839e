"""Measures of a student at each position of a row: of its next tokens, and against a teacher's targets.

Shape legend:  P positions of a chunk, V student vocabulary, U teacher vocabulary, K kept ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_trainer.losses import MIN_TAIL_MASS, NO_LABEL, TeacherTargets, kl_and_overlap

TEXT = ("labels", "loss", "right", "confidence")
"""Columns of `of_labels`: the number of labels, cross-entropy in nats, the likeliest token being the next one, and its
probability; 0 where there is no label."""
KEPT = ("positions", "kl", "top1", "overlap", "mass")
"""Columns of `of_top_k`."""
WHOLE = ("positions", "full_kl", "reverse_kl", "total_variation", "acceptance")
"""Columns of `of_whole`."""


def of_labels(log_p: Tensor, labels: Tensor) -> Tensor:
    """Measure the student's next tokens: [P, 4] float64, columns `TEXT`.

    Args:
        log_p: [P, V] float, nats.
        labels: [P] int64; `NO_LABEL` where there is none.
    """
    there = labels != NO_LABEL
    loss = -log_p.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    best = log_p.max(dim=-1)
    columns = (torch.ones_like(loss), loss, best.indices == labels, best.values.exp())
    return _columns(*(torch.where(there, column.double(), 0.0) for column in columns))


def of_top_k(logits: Tensor, teacher: TeacherTargets) -> Tensor:
    """Compare with a teacher's top-k and tail: [P, 5] float64, columns `KEPT`.

    They are 1, the forward KL of top-k + tail in nats, both having the same likeliest token, the share of the teacher's
    K ids that are among the student's K likeliest, and the student's probability of them. All are less by what is not
    resolved of a projected position, so that means are of what the teacher says.

    Args:
        logits: [P, V] float.
        teacher: targets of the positions.
    """
    kl, top1, mass = kl_and_overlap(logits, teacher)
    vocab, k = logits.shape[-1], min(teacher.ids.shape[-1], logits.shape[-1])
    kept = teacher.logprobs > -math.inf  # rows with fewer ids than others are filled up
    num_kept = kept.sum(dim=-1).clamp(min=1, max=k)
    likeliest = logits.topk(k, dim=-1).indices
    counts = torch.arange(k, device=logits.device) < num_kept[:, None]
    among = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, likeliest, counts)
    ids = teacher.ids.long()
    found = among.gather(-1, ids.clamp(max=vocab - 1)) & kept & (ids < vocab)
    columns = _columns(torch.ones_like(kl), kl, top1, found.sum(dim=-1) / num_kept, mass)
    return columns * teacher.resolved.double()[:, None]


def of_whole(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Compare with a teacher's whole distribution: [P, 5] float64, columns `WHOLE`.

    They are 1, KL(t || p) and KL(p || t) in nats, 1/2 sum |p - t|, and sum min(p, t), the share of the student's tokens
    that speculative decoding accepts. The teacher's numbers are made to sum to 1, which their float16 do to 0.001. Ids
    that only one of the two has count as one id, of no mass to the other; where its logarithm would be infinite, it is
    that of `MIN_TAIL_MASS`, as in the losses.

    Args:
        log_p: [P, V] float, nats.
        log_t: [P, U] float, nats.
    """
    log_t = log_t.to(log_p.dtype)
    log_t = log_t - log_t.logsumexp(dim=-1, keepdim=True)
    shared = min(log_p.shape[-1], log_t.shape[-1])
    p_rest, t_rest = (_mass(each[:, shared:]) for each in (log_p, log_t))  # at most one has any
    log_p, log_t = log_p[:, :shared], log_t[:, :shared]
    p, t = log_p.exp(), log_t.exp()
    far = log_p - log_t.masked_fill(log_t == -math.inf, math.log(MIN_TAIL_MASS))
    kl, reverse = _total(-t * far), _total(p * far)
    variation = 0.5 * (_total((p - t).abs()) + p_rest + t_rest)
    accepted = _total(torch.minimum(p, t))
    return _columns(torch.ones_like(kl), kl + _alone(t_rest), reverse + _alone(p_rest), variation, accepted)


def _alone(mass: Tensor) -> Tensor:
    """The KL's term [P] of an id that only one of the two has."""
    return torch.where(mass > MIN_TAIL_MASS, mass * (mass.clamp(min=MIN_TAIL_MASS) / MIN_TAIL_MASS).log(), 0.0)


def _mass(logprobs: Tensor) -> Tensor:
    return _total(logprobs.exp())


def _total(terms: Tensor) -> Tensor:
    return terms.sum(dim=-1, dtype=torch.float64)


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack([column.double() for column in columns], dim=-1)
