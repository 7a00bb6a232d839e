"""Targets of random distributions, and every loss written the plain way: dense, in float64, for autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from potstill.student_trainer.losses import MIN_TAIL_MASS, NO_LABEL, Objective, TeacherTargets

TOP_K_LOSSES = ("forward_kl", "reverse_kl", "jsd", "generalised_kl", "partial", "renormalised", "tvd")


def random_array(seed: int, *shape: int) -> Tensor:
    """Standard normal float64, the same on every machine: torch's own depend on what its CPU can do."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def top_k_of(dense: Tensor, k: int, *, weight: float | Tensor = 1.0) -> TeacherTargets:
    """Top-k targets of logprobs [..., V]."""
    logprobs, ids = dense.topk(k, -1)
    rest = dense.scatter(-1, ids, -math.inf)
    return TeacherTargets(ids, logprobs, torch.logsumexp(rest, -1), weight)


def dense_values(z: Tensor, teacher: TeacherTargets, objective: Objective) -> Tensor:
    """Divergence of each position [...], differentiable by z [..., V], float64."""
    name, temperature = objective.loss, objective.temperature
    log_p = torch.log_softmax(z.double() / temperature, -1)
    in_k = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, teacher.ids.long(), True)
    on_k = log_p.gather(-1, teacher.ids.long())
    rest = torch.logsumexp(log_p.masked_fill(in_k, -math.inf), -1, keepdim=True)
    log_t, log_r = teacher.logprobs.double(), teacher.log_tail.double()[..., None]
    if temperature != 1.0:
        assert teacher.log_z is not None
        log_t = log_t / temperature - teacher.log_z.double()[..., None]
        log_r = torch.log(1 - log_t.exp().sum(-1, keepdim=True))
    if name in ("generalised_kl", "partial"):
        t, p = log_t.exp(), on_k.exp()
        extra = p - t if name == "generalised_kl" else 0.0
        return (t * (log_t - on_k) + extra).sum(-1)
    if name == "renormalised":
        s = torch.softmax(log_t, -1)
        return (s * (s.log() - on_k)).sum(-1)
    q, s = torch.cat([log_t, log_r], -1), torch.cat([on_k, rest], -1)
    if name == "forward_kl":
        return (q.exp() * (q - s)).sum(-1)
    if name == "reverse_kl":
        return (s.exp() * (s - q.clamp(min=math.log(MIN_TAIL_MASS)))).sum(-1)
    if name == "tvd":
        return (q.exp() - s.exp()).abs().sum(-1) / 2
    assert name == "jsd"
    beta = objective.beta
    m = torch.log(beta * q.exp() + (1 - beta) * s.exp())
    return (beta * q.exp() * (q - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def dense_loss(
    z: Tensor,
    labels: Tensor,
    mask: Tensor,
    teachers: list[TeacherTargets],
    objective: Objective,
    *,
    alpha: float,
    num_labels: float,
    num_positions: float,
) -> Tensor:
    """The whole mixed loss [], differentiable by z [..., V]."""
    chosen = torch.where(mask, labels, NO_LABEL).reshape(-1)
    flat = z.double().reshape(-1, z.shape[-1])
    ce = torch.nn.functional.cross_entropy(flat, chosen, ignore_index=NO_LABEL, reduction="sum")
    total = (1 - alpha) * ce / num_labels
    for teacher in teachers:
        values = teacher.weight * dense_values(z, teacher, objective) * objective.temperature**2
        total = total + alpha * torch.where(mask, values, 0.0).sum() / num_positions
    return total


def exact_gradient(z: list[float], teachers: list[TeacherTargets], name: str) -> Tensor:
    """The gradient [V] of one position's weighted divergences, by differences of numbers of 100 digits."""
    with mpmath.workdps(100):
        step, found = mpmath.mpf(10) ** -40, []
        for j in range(len(z)):
            around = []
            for sign in (1, -1):
                moved = [mpmath.mpf(x) + (sign * step if i == j else 0) for i, x in enumerate(z)]
                total = mpmath.fsum(mpmath.exp(x) for x in moved)
                p = [mpmath.exp(x) / total for x in moved]
                around.append(mpmath.fsum(t.weight * _exact_value(p, t, name) for t in teachers))
            found.append(float((around[0] - around[1]) / (2 * step)))
    return torch.tensor(found, dtype=torch.float64)


def _exact_value(p: list[Any], teacher: TeacherTargets, name: str) -> Any:
    ids = teacher.ids[0].tolist()
    q = [mpmath.exp(mpmath.mpf(x)) for x in (*teacher.logprobs[0].tolist(), teacher.log_tail[0].item())]
    s = [*(p[i] for i in ids), mpmath.fsum(x for i, x in enumerate(p) if i not in ids)]
    log = mpmath.log
    if name in ("generalised_kl", "partial"):
        extra = mpmath.fsum(s[:-1]) - mpmath.fsum(q[:-1]) if name == "generalised_kl" else 0
        return mpmath.fsum(a * log(a / b) for a, b in zip(q[:-1], s, strict=False)) + extra
    if name == "renormalised":
        kept = mpmath.fsum(q[:-1])
        return mpmath.fsum(a / kept * log(a / kept / b) for a, b in zip(q[:-1], s, strict=False))
    terms: dict[str, Callable[[Any, Any], Any]] = {
        "forward_kl": lambda a, b: a * log(a / b),
        "reverse_kl": lambda a, b: b * log(b / a),
        "tvd": lambda a, b: abs(a - b) / 2,
        "jsd": lambda a, b: (a * log(2 * a / (a + b)) + b * log(2 * b / (a + b))) / 2,
    }
    return mpmath.fsum(terms[name](a, b) for a, b in zip(q, s, strict=True))
