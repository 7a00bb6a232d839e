"""Losses of a student: cross-entropy mixed with a divergence from each of several teachers.

`engine` has the gradient of every loss, `divergences` what each one measures; `objective` chooses one and makes what it
aims at of a teacher's targets, with `draws` and `temperature`; `chunks` goes through positions; `logits` and `linear`
are what a training loop calls.
"""

from potstill.student_trainer.losses.agreement import kl_and_overlap
from potstill.student_trainer.losses.divergences import MIN_TAIL_MASS
from potstill.student_trainer.losses.linear import Logits, linear_distillation_loss
from potstill.student_trainer.losses.logits import distillation_loss
from potstill.student_trainer.losses.objective import LOSSES, Objective
from potstill.student_trainer.losses.targets import NO_LABEL, Loss, TeacherTargets

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
]
