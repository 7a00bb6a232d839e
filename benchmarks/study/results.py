"""Results of the study's runs: for each a small JSON file, from which the page is made and the next call goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.plan import Plan
from potstill.cache.errors import FormatError, SpecMismatch
from potstill.student_trainer.config.run_folder import write_json

LOSS, KL, REVERSE_KL, ACCEPTANCE, TOP1 = "loss", "kl", "reverse_kl", "acceptance", "top1"
"""Measures: cross-entropy in nats a token; against the teacher's whole distribution KL(t || p), KL(p || t) in nats and
the sum of min(p, t); and the share of positions with the teacher's likeliest token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One cell with one seed, judged on the held-out documents."""

    plan: str
    """Hash of what the plan says of the cell, and of the text."""
    cell: str
    seed: int
    tokens: int
    """Targets learnt."""
    seconds: float
    """Of training, on a machine shared with other work."""
    parameters: int
    made: Mapping[str, str]
    """Machine, commit, time and versions."""
    kinds: list[str]
    """[D] kind of each held-out document."""
    labels: list[int]
    """[D] its positions with a next token."""
    positions: list[int]
    """[D] all of its positions."""
    measures: Mapping[str, list[float]]
    """[D] sums over labels (the loss) or positions (all others)."""
    bins: list[list[float]]
    """[B, 3] of `evaluate.calibration`, over all documents."""
    curve: list[list[float]]
    """Tokens learnt and held-out loss, at each look."""

    def counts(self, measure: str) -> NDArray[np.float64]:
        """Give the positions [D] that a measure is over."""
        return np.asarray(self.labels if measure == LOSS else self.positions, dtype=np.float64)

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        count, confidence, right = np.asarray(self.bins).T
        return float(np.abs(right - confidence).sum() / count.sum())

    @property
    def flops(self) -> float:
        """Operations of training, as six for each parameter and token."""
        return 6.0 * self.parameters * self.tokens

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.cell}-{self.seed}.json"

    def save(self, folder: Path) -> None:
        """Write it whole, under its name."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / self.name, asdict(self))


def load_results(folders: Iterable[Path], plan: Plan, text: str) -> dict[tuple[str, int], Result]:
    """Read the results in some folders, by cell and seed.

    Args:
        folders: those that are there are looked into.
        plan: of the study.
        text: hash of its text.

    Raises:
        SpecMismatch: one is of another plan, or of other text. FormatError: one cannot be read.
    """
    hashes = {cell.name: plan.sha256(cell.name, text) for cell in plan.cells}
    found = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            result = Result(**value)
        except (OSError, TypeError, ValueError) as error:
            raise FormatError(
                f"{str(file)!r} is no result of this version ({error!r}); delete it to run it again"
            ) from error
        wanted = hashes.get(result.cell, "without that cell")
        if result.plan != wanted:
            raise SpecMismatch(
                f"{str(file)!r} is of plan {result.plan[:12]}, but this plan with this text is {wanted[:17]}: results "
                "of two do not compare; change the plan back, or move the results of the other away"
            )
        found[result.cell, result.seed] = result
    return found
