"""The comparison of an ablation's cells with its baseline, made of the outcomes of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import SpecMismatch
from potstill.cache.types import JSON
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.intervals import Difference, difference, signed
from potstill.student_trainer.ablate.measures import LOSS
from potstill.student_trainer.ablate.outcome import Failure, Outcome, PerDocument, Point
from potstill.student_trainer.config.leaves import leaves


@dataclass(frozen=True, slots=True)
class Reached:
    """The way to the target loss, as a mean over the seeds that came there."""

    seeds: int
    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell."""

    cell: str
    seeds: int
    """Number of its runs that came to their end."""
    means: Mapping[str, float]
    """Mean over seeds of each measure; of tokens in nats, or a share."""
    differences: Mapping[str, Difference]
    """Those less the baseline's, over the seeds that both have; none of the baseline itself."""
    reached: Reached | None
    """None where no seed came to the target loss, or its looks were at other rows than the baseline's."""
    seconds: float
    """Of a run, on average."""
    failures: tuple[str, ...]
    """What ended the others."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cells, the baseline first."""

    baseline: str
    seeds: int
    documents: int
    """Held-out documents."""
    tokens: int
    """Labelled held-out tokens."""
    target_loss: float | None
    """Held-out loss whose tokens and seconds are told; None where the baseline has no outcome."""
    higher_is_better: Mapping[str, bool | None]
    """By measure; None where neither is."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """Remarks on the students' answers to tasks."""

    @property
    def measures(self) -> list[str]:
        """Names of all measures."""
        return list(dict.fromkeys(name for row in self.rows for name in row.means))

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute; each difference has `within_noise`, too."""
        value = asdict(self)
        for told, row in zip(value["rows"], self.rows, strict=True):
            for name, each in row.differences.items():
                told["differences"][name]["within_noise"] = each.within_noise
        return value


def compare(grid: GridConfig, outcomes: Mapping[tuple[str, int], Outcome], failures: Sequence[Failure]) -> Comparison:
    """Compare what there is.

    Args:
        grid: the ablation.
        outcomes: of the runs that came to their end, by cell and seed.
        failures: of those that did not.

    Raises:
        SpecMismatch: two runs were judged on different documents.
    """
    by_cell: dict[str, dict[int, Outcome]] = {cell.name: {} for cell in grid.all_cells}
    for (cell, seed), outcome in outcomes.items():
        by_cell[cell][seed] = outcome
    labels = _same_documents(list(outcomes.values()))
    base = by_cell[grid.baseline]
    target = grid.target_loss or (_means(base)[LOSS] if base else None)
    rows = []
    for name in sorted(by_cell, key=lambda name: name != grid.baseline):
        ours = by_cell[name]
        rows.append(
            Row(
                cell=name,
                seeds=len(ours),
                means=_means(ours),
                differences={} if name == grid.baseline else _differences(ours, base, grid.resamples),
                reached=None if target is None or _looks_elsewhere(ours, base) else _reached(ours, target),
                seconds=float(np.mean([each.seconds for each in ours.values()])) if ours else 0.0,
                failures=tuple(f"seed {each.seed}: {each.detail}" for each in failures if each.cell == name),
            )
        )
    told = tuple(dict.fromkeys(note for each in outcomes.values() for note in each.notes))
    better = {name: each.higher_is_better for one in outcomes.values() for name, each in one.measures.items()}
    documents = int(np.count_nonzero(labels))
    return Comparison(grid.baseline, len(grid.seeds), documents, int(sum(labels)), target, better, tuple(rows), told)


def _same_documents(outcomes: Sequence[Outcome]) -> list[float]:
    """Find the labelled held-out tokens of each document, which all runs share."""
    if not outcomes:
        return []
    first = outcomes[0]
    labels = first.measures[LOSS].counts
    other = next((each for each in outcomes if each.measures[LOSS].counts != labels), None)
    if other is not None:
        raise SpecMismatch(
            f"runs of cells {first.cell!r} and {other.cell!r} were judged on different documents; leave data as it is"
        )
    return labels


def _measures(runs: Mapping[int, Outcome]) -> list[str]:
    """Names of the measures that all runs of a cell have, `LOSS` first."""
    kept = [set(each.measures) for each in runs.values()]
    return sorted(set.intersection(*kept), key=lambda name: (name != LOSS, name)) if kept else []


def _means(runs: Mapping[int, Outcome]) -> dict[str, float]:
    found = {name: _stacked(runs, sorted(runs), name) for name in _measures(runs)}
    return {name: float(signed(sums).sum(axis=1).mean() / counts.sum()) for name, (sums, counts) in found.items()}


def _stacked(
    runs: Mapping[int, Outcome], seeds: Sequence[int], measure: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of a measure, [S, D] or of bins [S, D, B], and the counts [D] that they are of."""
    found: list[PerDocument] = [runs[seed].measures[measure] for seed in seeds]
    return np.asarray([each.sums for each in found]), np.asarray(found[0].counts)


def _differences(ours: Mapping[int, Outcome], base: Mapping[int, Outcome], resamples: int) -> dict[str, Difference]:
    seeds = sorted(ours.keys() & base.keys())
    found = {}
    for name in _measures(ours) if seeds else []:
        if name in _measures(base):
            (sums, counts), (theirs, _) = _stacked(ours, seeds, name), _stacked(base, seeds, name)
            there = counts > 0
            found[name] = difference(sums[:, there], theirs[:, there], counts[there], resamples=resamples)
    return found


def _looks_elsewhere(ours: Mapping[int, Outcome], base: Mapping[int, Outcome]) -> bool:
    """Tell whether a cell leaves out other rows than the baseline, of those that it looks at while it trains, too."""
    key = "data.leave_out"
    left_out, of_base = (
        {pair for each in runs.values() for pair in leaves(each.config) if pair[0].startswith(key)}
        for runs in (ours, base)
    )
    return bool(ours and base) and left_out != of_base


def _reached(runs: Mapping[int, Outcome], target: float) -> Reached | None:
    found = [point for each in runs.values() if (point := _crossing(each.curve, target)) is not None]
    if not found:
        return None
    tokens, seconds = np.mean([[point.tokens, point.seconds] for point in found], axis=0)
    return Reached(len(found), float(tokens), float(seconds))


def _crossing(curve: Sequence[Point], target: float) -> Point | None:
    """Find where a curve first comes down to the target, on a line between two looks."""
    before: Point | None = None
    for point in curve:
        if point.loss <= target:
            share = 1.0 if before is None else (before.loss - target) / (before.loss - point.loss)
            start = point if before is None else before
            tokens = start.tokens + share * (point.tokens - start.tokens)
            return Point(round(tokens), start.seconds + share * (point.seconds - start.seconds), target)
        before = point
    return None
