"""Losses of a student: cross-entropy mixed with a divergence from each of several teachers.

`engine` has the gradient of every loss, `divergences` what each one measures; `objective` chooses one and makes what it
aims at of a teacher's targets, with `draws` and `temperature`; `chunks` goes through positions; `logits` and `linear`
are what a training loop calls. `settings` are those of a run, of which `mix` gives the shares of a step and `weighting`
those of a token.

Each name is imported when it is first used, so that settings are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill.student_trainer.losses.agreement import kl_and_overlap
    from potstill.student_trainer.losses.divergences import MIN_TAIL_MASS
    from potstill.student_trainer.losses.linear import Logits, linear_distillation_loss
    from potstill.student_trainer.losses.logits import distillation_loss
    from potstill.student_trainer.losses.objective import LOSSES, Objective
    from potstill.student_trainer.losses.targets import NO_LABEL, Loss, TeacherTargets
    from potstill.student_trainer.losses.weighting import weighted

__all__ = [
    "LOSSES",
    "MIN_TAIL_MASS",
    "NO_LABEL",
    "Logits",
    "Loss",
    "Objective",
    "TeacherTargets",
    "distillation_loss",
    "kl_and_overlap",
    "linear_distillation_loss",
    "weighted",
]

_HOMES = {
    "LOSSES": "objective",
    "MIN_TAIL_MASS": "divergences",
    "NO_LABEL": "targets",
    "Logits": "linear",
    "Loss": "targets",
    "Objective": "objective",
    "TeacherTargets": "targets",
    "distillation_loss": "logits",
    "kl_and_overlap": "agreement",
    "linear_distillation_loss": "linear",
    "weighted": "weighting",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
