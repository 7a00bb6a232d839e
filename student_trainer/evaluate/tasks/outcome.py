"""Scores that the harness found of a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.cache.types import JSON
from potstill.student_trainer.evaluate.means import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of a task."""

    measure: Measure
    """With the harness's own standard error, over questions."""
    higher_is_better: bool | None

    def to_json(self) -> dict[str, JSON]:
        """The measure's JSON object, and the direction."""
        return {**self.measure.to_json(), "higher_is_better": self.higher_is_better}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """All scores of one task, or of a group of tasks."""

    questions: int | None
    """None of a group."""
    shots: int | None
    """Examples in front of each question; None where a group's tasks differ."""
    scores: Mapping[str, Score]
    """By metric."""
    of_questions: Mapping[str, list[float]] = field(default_factory=dict)
    """The value of each question, of the metrics that are means of them; only where they were asked for."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object without the single questions."""
        scores: dict[str, JSON] = {name: score.to_json() for name, score in self.scores.items()}
        return {"questions": self.questions, "shots": self.shots, "scores": scores}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcomes:
    """All that one run of the harness found."""

    version: str
    """The harness's."""
    tasks: Mapping[str, TaskOutcome]
    """By name."""
    notes: tuple[str, ...]
    """What the harness warned of, and files that are no tasks."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute."""
        tasks: dict[str, JSON] = {name: task.to_json() for name, task in self.tasks.items()}
        return {"lm_eval": self.version, "tasks": tasks, "task_notes": list(self.notes)}
