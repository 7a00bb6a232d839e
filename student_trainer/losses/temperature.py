"""A teacher's distribution at another temperature, exactly.

    log t_T(i) = log t(i) / T - log Z_T,    Z_T = sum of t**(1/T) over the vocabulary

The top-k does not tell Z_T: of a natural distribution at T = 2 it may keep a tenth of the mass. So Z_T is kept when
targets are made, and without it another temperature is refused.

Kept logprobs are rounded, by `u8` up to 1/16 nat. At T that is 1/T times as much, all of one sign at worst, so that
what is kept can seem to hold more than all. It is scaled to 1 where rounding explains it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_trainer.losses.targets import TeacherTargets

_ROUNDED = 1 / 16 + 0.001
"""Nats by which a kept logprob may be off, by the coarsest encoding."""
_LOG_Z_ROUNDED = 0.004
"""Nats by which a kept log Z may be off."""


def at_temperature(teacher: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids [..., K], log t_T [..., K] of them, and of their tail [...], in float64; `teacher` has `log_z` at T."""
    assert teacher.log_z is not None, "checked by the objective"
    log_t = teacher.logprobs.double() / temperature - teacher.log_z.double()[..., None]
    log_kept = torch.logsumexp(log_t, dim=-1)
    # A mass that is far over 1 stays so, and is found by its sum, later.
    too_much = log_kept.clamp(0.0, _ROUNDED / temperature + _LOG_Z_ROUNDED)
    log_t, kept = log_t - too_much[..., None], (log_kept - too_much).exp()
    log_r = torch.where(kept < 1.0, torch.log1p(-kept.clamp(max=1.0)), -math.inf)
    return teacher.ids.long(), log_t, torch.where(kept.isnan(), kept, log_r)
