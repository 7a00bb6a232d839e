"""A teacher's distribution at another temperature, exactly.

    log t_T(i) = log t(i) / T - log Z_T,    Z_T = sum of t**(1/T) over the vocabulary

The top-k does not tell Z_T: of a natural distribution at T = 2 it may keep a tenth of the mass. So Z_T is kept when
targets are made, and without it another temperature is refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.student_trainer.losses.targets import TeacherTargets


def at_temperature(teacher: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids [..., K], log t_T [..., K] of them, and of their tail [...], in float64; `teacher` has `log_z` at T."""
    assert teacher.log_z is not None, "checked by the objective"
    log_t = teacher.logprobs.double() / temperature - teacher.log_z.double()[..., None]
    kept = log_t.exp().sum(dim=-1)
    # Rounding of what is kept may pass 1 a little; a mass that is far over 1 is found by its sum, later.
    log_r = torch.where(kept < 1.0, torch.log1p(-kept.clamp(max=1.0)), -math.inf)
    return teacher.ids.long(), log_t, torch.where(kept.isnan(), kept, log_r)
