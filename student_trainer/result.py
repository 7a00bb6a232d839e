"""Results of a run, as `train` returns them and `summary.json` holds them. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.cache.errors import FormatError
from potstill.cache.types import JSON
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.run_folder import read_config

SUMMARY = "summary.json"
"""Name of the file in a finished run's folder that holds its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAgreement:
    """Distance of a student from one teacher: means over the held-out positions."""

    kl: float
    """Top-k + tail forward KL to the teacher, nats per token."""
    top1_agreement: float
    """Share of positions at which both find the same token most likely."""
    student_mass_on_top_k: float
    """The student's probability of the teacher's top-k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measures of a student on some rows."""

    rows: int
    tokens: int
    ce: float | None
    """Cross-entropy, nats per labelled token; None where no token has a label."""
    teachers: dict[str, TeacherAgreement]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        """Read what `to_json` wrote."""
        teachers = {name: TeacherAgreement(**found) for name, found in value["teachers"].items()}
        return cls(**{**value, "teachers": teachers})

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The result of a call of `train`."""

    run_dir: Path
    finished: bool
    """False when it was stopped; the same call goes on from `step`."""
    step: int
    tokens: int
    """Positions trained on since the start of the run."""
    seconds: float
    """Time since the start of the run, over all sessions, evaluations included."""
    held_out: Evaluation | None
    """Evaluation of the final model; None without held-out rows, or when stopped."""
    problem: str = ""
    """Cause of a stop that nobody asked for: a service that does not answer."""

    def to_json(self) -> dict[str, JSON]:
        """The object that `SUMMARY` holds."""
        value: dict[str, JSON] = asdict(self)
        return {key: value[key] for key in ("step", "tokens", "seconds", "held_out")}


def finished_result(config: TrainConfig) -> TrainResult | None:
    """Read the result of the run in `config.train.out`; None unless it is finished under this config.

    Raises:
        FormatError: a summary of another version.
    """
    file = config.run_dir / SUMMARY
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["step"] != config.train.steps:
            return None
        held_out = None if value["held_out"] is None else Evaluation.from_json(value["held_out"])
        told = {name: value[name] for name in ("step", "tokens", "seconds")}
        return TrainResult(run_dir=config.run_dir, finished=True, **told, held_out=held_out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error!r}") from error


def finished_before(config: TrainConfig) -> TrainResult | None:
    """Read the result of the run in `config.train.out`, or None; check that it is the run of this config.

    Raises:
        SpecMismatch: the folder holds another run. FormatError: it was written by another version.
    """
    config = config.absolute()
    if (config.run_dir / "config.json").exists():
        config.check_continues(read_config(config.run_dir))
    return finished_result(config)
