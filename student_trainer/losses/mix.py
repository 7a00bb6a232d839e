"""Shares of the losses over the steps of a run."""

from __future__ import annotations

import numpy as np

from potstill.student_trainer.losses.settings import LossConfig


def alpha_at(loss: LossConfig, step: int) -> float:
    """Give alpha of the step that follows `step` steps: linear between its points; 0 where nothing is distilled."""
    if step % loss.distil_every:
        return 0.0
    points = loss.alpha_points
    return float(np.interp(step, [at for at, _ in points], [share for _, share in points]))


def distils_at(loss: LossConfig, step: int) -> bool:
    """Tell whether the step that follows `step` steps reads targets."""
    return not step % loss.distil_every and (loss.alm > 0 or alpha_at(loss, step) > 0)
