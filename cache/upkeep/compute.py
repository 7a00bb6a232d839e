"""Estimate of the accelerators' time that scoring with teachers and training a student take, by the usual rule.

A forward pass takes about 2 N floating-point operations a position for N parameters, a training step 6 N (Kaplan et
al., arXiv 2001.08361). Attention over long rows, embeddings and recomputed activations are left out; what a device
reaches of its peak, the model FLOPs utilization (MFU), covers everything else and is the user's to give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from potstill.cache.errors import InvalidInput

Work = Literal["scoring", "training"]
_OPERATIONS: dict[Work, float] = {"scoring": 2.0, "training": 6.0}
"""Operations a parameter and position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Accelerators that share the work.

    Raises:
        InvalidInput: a number is out of its range.
    """

    count: int = 8
    peak_flops: float = 989e12
    """Operations a second of one; by default those of an H100 SXM in bfloat16, dense."""
    mfu: float = 0.4
    """Share of the peak that is reached, over 0 and at most 1."""
    hour_price: float = 2.5
    """US dollars for an hour of one."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidInput(f"--gpus is {self.count}; it must be at least 1")
        if not 0 < self.mfu <= 1:
            raise InvalidInput(f"--mfu is {self.mfu}; it must be over 0 and at most 1, such as 0.4")
        if not 1e9 <= self.peak_flops <= 1e18:
            raise InvalidInput(f"--gpu-flops is {self.peak_flops:g}; it must be 1e9 to 1e18, such as 989T")
        if not 0 <= self.hour_price < math.inf:
            raise InvalidInput(f"--gpu-hour is {self.hour_price}; a price must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Time and cost of one model's work."""

    work: Work
    parameters: int
    operations: float
    device_hours: float
    days: float
    """With all devices."""
    cost: float
    """US dollars."""


def compute(
    positions: int, teachers: Sequence[int], student: int | None, devices: Devices, *, passes: float = 1.0
) -> list[Compute]:
    """Estimate the work of each teacher, which reads every position once, and of the student.

    Args:
        positions: of the corpus.
        teachers: parameters of each; of a mixture of experts, those that are active.
        student: its parameters; None for no student.
        devices: what computes.
        passes: how often the student reads the corpus.

    Raises:
        InvalidInput: `passes` is no positive number.
    """
    if not 0 < passes < math.inf:
        raise InvalidInput(f"--passes is {passes}; it must be over 0")
    found = [_of("scoring", each, positions, devices) for each in teachers]
    return found if student is None else [*found, _of("training", student, positions * passes, devices)]


def _of(work: Work, parameters: int, positions: float, devices: Devices) -> Compute:
    operations = _OPERATIONS[work] * parameters * positions
    hours = operations / (devices.peak_flops * devices.mfu) / 3600
    return Compute(
        work=work,
        parameters=parameters,
        operations=operations,
        device_hours=hours,
        days=hours / 24 / devices.count,
        cost=hours * devices.hour_price,
    )
