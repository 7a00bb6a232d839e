"""Results of a run, as `train` returns them and `summary.json` holds them. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.cache.errors import FormatError
from potstill.cache.types import JSON
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.resume import check_continues
from potstill.student_trainer.config.run_folder import read_config

SUMMARY = "summary.json"
"""Name of the file in a finished run's folder that holds its result."""

HELD_OUT = ""
"""Name of the evaluation on the held-out rows, which no corpus has."""


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
    """Targets that count, by the corpus's loss mask."""
    ce: float | None
    """Cross-entropy, nats per labelled token; None where no token has a label."""
    teachers: dict[str, TeacherAgreement]
    documents: int | None = None
    """Documents that the rows are of; None in what an earlier version wrote."""

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
    """Targets learnt since the start of the run."""
    seconds: float
    """Time since the start of the run, over all sessions, evaluations included."""
    held_out: Evaluation | None
    """Evaluation of the final model; None without held-out rows, or when stopped."""
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """Evaluations of the final model on `data.eval_corpora`, by name; none when stopped."""
    skipped_rows: int = 0
    """Rows of the corpora that were never used, for want of targets (`data.missing`)."""
    rollbacks: int = 0
    """Loss spikes that the run went back from, each leaving out the rows of a step (`skipped.json`)."""
    problem: str = ""
    """Cause of a stop that nobody asked for: a service that does not answer."""

    def to_json(self) -> dict[str, JSON]:
        """The object that `SUMMARY` holds."""
        told: dict[str, JSON] = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "held_out": None}
        told |= {"skipped_rows": self.skipped_rows} if self.skipped_rows else {}
        told |= {"rollbacks": self.rollbacks} if self.rollbacks else {}
        held_out = {} if self.held_out is None else {HELD_OUT: self.held_out}
        return told | evaluations_to_json({**held_out, **self.evaluations})


def evaluations_to_json(found: Mapping[str, Evaluation]) -> dict[str, JSON]:
    """Write evaluations as they lie in metrics and summary: on held-out rows as `held_out`, others in `evaluations`."""
    told: dict[str, JSON] = {name: evaluation.to_json() for name, evaluation in found.items()}
    held_out: dict[str, JSON] = {"held_out": told.pop(HELD_OUT)} if HELD_OUT in told else {}
    others: dict[str, JSON] = {"evaluations": told} if told else {}
    return held_out | others


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
        others = {name: Evaluation.from_json(found) for name, found in value.get("evaluations", {}).items()}
        skipped = value.get("skipped_rows", 0)
        return TrainResult(
            run_dir=config.run_dir,
            finished=True,
            **told,
            skipped_rows=skipped,
            rollbacks=value.get("rollbacks", 0),
            held_out=held_out,
            evaluations=others,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error!r}") from error


def finished_before(config: TrainConfig) -> TrainResult | None:
    """Read the result of the run in `config.train.out`, or None; check that it is the run of this config.

    Raises:
        SpecMismatch: the folder holds another run. FormatError: it was written by another version.
    """
    config = config.absolute()
    if (config.run_dir / "config.json").exists():
        check_continues(config, read_config(config.run_dir))
    return finished_result(config)
