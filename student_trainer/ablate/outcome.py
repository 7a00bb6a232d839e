"""Outcomes of the runs of an ablation: for each a small JSON file beside its folder, from which the table is made.

<out>/runs/<cell>/<seed>/       the run, as `potstill train` leaves it
<out>/outcomes/<cell>/<seed>.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from potstill.cache.errors import FormatError
from potstill.cache.types import JSON
from potstill.student_trainer.config.run_folder import write_json


@dataclass(frozen=True, slots=True)
class Point:
    """One look at the held-out rows while a run trained."""

    tokens: int
    """Targets learnt until then."""
    seconds: float
    """Since the run began, over all sessions."""
    loss: float
    """Held-out cross-entropy, nats a token."""


@dataclass(frozen=True, slots=True)
class PerDocument:
    """One measure of each held-out document, in the order of documents, or of each question of a task."""

    counts: list[float]
    """Positions that it was measured at; 1 of a question."""
    sums: list[float] | list[list[float]]
    """Sum over them. Of a calibration error it is a list, the sum in each bin: those over all documents count by their
    absolute values."""
    higher_is_better: bool | None = False
    """None where neither is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run that came to its end."""

    cell: str
    seed: int
    config: Mapping[str, JSON]
    """The run's, as it was trained."""
    base: Mapping[str, JSON]
    """The run's that cells change, by whose teachers it was judged."""
    tokens: int
    """Targets learnt."""
    seconds: float
    measures: Mapping[str, PerDocument]
    """By name; see `measures`."""
    asked: str
    """Fingerprint of the questions that its student answered; empty where there were none."""
    notes: list[str]
    """Remarks on its answers."""
    curve: list[Point]

    def save(self, out: Path) -> None:
        """Write it whole, under its name.

        Raises:
            StoreError: the disk does not take it.
        """
        file = outcome_file(out, self.cell, self.seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(self))


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that came to no end: an error, or a process that was killed once too often."""

    cell: str
    seed: int
    detail: str


def load_outcome(out: Path, cell: str, seed: int) -> Outcome | None:
    """Read an outcome; None where there is none yet.

    Raises:
        FormatError: no outcome of this version.
    """
    file = outcome_file(out, cell, seed)
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        measures = {name: PerDocument(**found) for name, found in value["measures"].items()}
        return Outcome(**{**value, "measures": measures, "curve": [Point(**point) for point in value["curve"]]})
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise FormatError(
            f"{str(file)!r} is no outcome of this version ({error!r}); delete it, or all of {str(out / 'outcomes')!r}, "
            "and the same command judges again, without training where the run's folder is there"
        ) from error


def outcome_file(out: Path, cell: str, seed: int) -> Path:
    """The file of a run's outcome."""
    return out / "outcomes" / cell / f"{seed}.json"


def run_folder(out: Path, cell: str, seed: int) -> Path:
    """The folder of a run."""
    return out / "runs" / cell / str(seed)
