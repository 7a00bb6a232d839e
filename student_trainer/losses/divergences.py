"""Divergences of a student from a teacher, each merged to the ids K and everything else.

With t and r the teacher's probabilities, p and p_r the student's, and sums over K and the rest where nothing is said:

    forward_kl       sum t (log t - log p)                     never more than the full KL; zero where they agree on K
    reverse_kl       sum p (log p - log t)                     seeks modes; a t of zero counts as `MIN_TAIL_MASS`
    jsd(beta)        beta KL(t || m) + (1 - beta) KL(p || m)   m = beta t + (1 - beta) p
    tvd              1/2 sum |p - t|                           1 less the acceptance rate of speculative decoding
    generalised_kl   sum over K of t log(t / p) - t + p        needs no tail, and is least at p = t on K
    partial          sum over K of t (log t - log p)           its best p is t over the mass of K: over-confident
    renormalised     sum over K of s (log s - log p)           s is t over the mass of K: a top-k as if it were all
    cross_entropy    - sum over K of t log p                   of labels, and of draws

Forward KL in distillation: Hinton et al., arXiv 1503.02531; truncated and merged targets: Anshumann et al., "Sparse
Logit Sampling", arXiv 2503.16870; JSD(beta): Agarwal et al., "On-Policy Distillation", arXiv 2306.13649.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from potstill.student_trainer.losses.engine import Compared, Divergence, Measured

MIN_TAIL_MASS = 1e-6
"""Mass under which float32 says nothing: a teacher's tail counts as zero, and where a logarithm of no mass would be
infinite, it is that of this mass."""


def forward_kl(on: Compared) -> Measured:
    """Measure KL(t || p) in nats."""
    rest = _times(on.r, on.log_r - on.log_p_r)
    return Measured(_times(on.t, on.log_t - on.log_p).sum(dim=-1) + rest, -on.t, -on.r)


def reverse_kl(on: Compared) -> Measured:
    """Measure KL(p || t) in nats."""
    log_t = on.log_t.masked_fill(on.log_t == -math.inf, math.log(MIN_TAIL_MASS))
    far, far_r = on.log_p - log_t, on.log_p_r - on.log_r.clamp(min=math.log(MIN_TAIL_MASS))
    value = _times(on.p, far).sum(dim=-1) + _times(on.p_r, far_r)
    return _by_slopes(on, value, far, far_r)


def jsd(beta: float) -> Callable[[Compared], Measured]:
    """Make the measure of a generalised Jensen-Shannon divergence in nats; `beta` in (0, 1), 0.5 for the plain one."""

    def measure(on: Compared) -> Measured:
        value, slope = _jsd_terms(beta, on.log_t, on.log_p)
        rest, slope_r = _jsd_terms(beta, on.log_r, on.log_p_r)
        return _by_slopes(on, value.sum(dim=-1) + rest, slope, slope_r)

    return measure


def tvd(on: Compared) -> Measured:
    """Measure the total variation distance, in [0, 1]."""
    far, far_r = on.p - on.t, on.p_r - on.r
    value = 0.5 * (far.abs().sum(dim=-1) + far_r.abs())
    return _by_slopes(on, value, 0.5 * far.sign(), 0.5 * far_r.sign())


def generalised_kl(on: Compared) -> Measured:
    """Measure the KL of measures that need not sum to 1, over K only, in nats."""
    p, t = on.p, on.t
    return Measured((_times(t, on.log_t - on.log_p) - t + p).sum(dim=-1), p - t)


def partial(on: Compared) -> Measured:
    """Sum the forward KL's terms over K only, in nats; it can be below zero."""
    return Measured(_times(on.t, on.log_t - on.log_p).sum(dim=-1), -on.t)


def renormalised(on: Compared) -> Measured:
    """Measure the KL from t scaled to a mass of 1 on K, in nats."""
    # A position of whose ids the student has none has nothing to teach: -inf less this stays -inf.
    whole = torch.logsumexp(on.log_t, dim=-1, keepdim=True).clamp(min=torch.finfo(on.log_t.dtype).min)
    log_s = on.log_t - whole
    s = log_s.exp()
    return Measured(_times(s, log_s - on.log_p).sum(dim=-1), -s)


def cross_entropy(on: Compared) -> Measured:
    """Measure the cross-entropy of t on K in nats."""
    return Measured(-_times(on.t, on.log_p).sum(dim=-1), -on.t)


DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "jsd": Divergence(jsd(0.5)),
    "generalised_kl": Divergence(generalised_kl, has_tail=False),
    "partial": Divergence(partial, has_tail=False),
    "renormalised": Divergence(renormalised, has_tail=False),
    "tvd": Divergence(tvd),
}
"""Those of a top-k with its tail, by name."""


def _jsd_terms(beta: float, log_t: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of the sum, and its derivatives by p but for a constant."""
    log_m = torch.logaddexp(log_t + math.log(beta), log_p + math.log1p(-beta))
    slope = (1.0 - beta) * (log_p - log_m)
    return beta * _times(log_t.exp(), log_t - log_m) + _times(log_p.exp(), slope), slope


def _by_slopes(on: Compared, value: Tensor, slope: Tensor, slope_r: Tensor) -> Measured:
    """Make the derivatives by log p of those by p, `slope` [n, K] and `slope_r` [n]."""
    # Without the slope of what is most likely: else of a student that is sure of one id, the gradient would be the
    # difference of two numbers of the size of that slope, and drown in their rounding.
    best = on.log_p.argmax(dim=-1, keepdim=True)
    in_rest = on.log_p_r > on.log_p.gather(-1, best).squeeze(-1)
    most_likely = torch.where(in_rest, slope_r, slope.gather(-1, best).squeeze(-1))
    return Measured(value, _times(on.p, slope - most_likely[:, None]), _times(on.p_r, slope_r - most_likely))


def _times(mass: Tensor, log: Tensor) -> Tensor:
    """Multiply, so that no mass gives 0 whatever the logarithm is, and NaN stays NaN."""
    return torch.where(mass == 0, 0.0, mass * log)
