"""The page of an ablation: one file with the differences from the baseline, their intervals and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.cache.upkeep.charts import Axis, Chart, line_chart, pages_of
from potstill.student_trainer.ablate.comparison import Comparison
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.intervals import Interval
from potstill.student_trainer.ablate.measures import ARROWS, LOSS, counted_over, sections_of, title_of
from potstill.student_trainer.ablate.outcome import Outcome, Point
from potstill.student_trainer.ablate.table import more_than_noise, verdict
from potstill.student_trainer.config.leaves import leaves

_LEFT, _RIGHT, _ROW, _TOP = 190, 700, 30, 16
_MOST_CURVES = 8
"""Colours that charts have."""


@dataclass(frozen=True, slots=True)
class Span:
    """One cell of a plot of differences, in SVG units."""

    cell: str
    y: float
    x: float
    seeds: tuple[float, float] | None
    documents: tuple[float, float] | None
    told: str
    """The difference in words."""


@dataclass(frozen=True, slots=True)
class Differences:
    """A plot of all cells' differences from the baseline in one measure."""

    spans: tuple[Span, ...]
    zero: float
    ticks: tuple[tuple[float, str], ...]
    height: float


def write_page(file: Path, found: Comparison, grid: GridConfig, outcomes: Mapping[tuple[str, int], Outcome]) -> Path:
    """Write the page of a comparison, and return its file."""
    sections = sections_of(found.measures)
    measures = [name for section in sections for name in section.measures]
    page = pages_of("potstill.student_trainer.ablate").get_template("ablation.html.jinja")
    plots = {name: plot for name in measures if (plot := _differences(found, name)) is not None}
    text = page.render(
        found=found,
        verdict=verdict,
        sections=sections,
        told={section.title: more_than_noise(found, section) for section in sections},
        titles={name: title_of(name) + ARROWS[found.higher_is_better[name]] for name in measures},
        counted_over=counted_over,
        plots=plots,
        over_documents=[name for name, plot in plots.items() if any(span.documents for span in plot.spans)],
        curves=_curves(grid, outcomes),
        changes={cell.name: dict(leaves(cell.changes)) for cell in grid.all_cells},
        frame={"left": _LEFT, "right": _RIGHT, "top": _TOP},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _differences(found: Comparison, measure: str) -> Differences | None:
    """Place the differences of all cells that have the measure; None where none has."""
    rows = [(row.cell, each) for row in found.rows if (each := row.differences.get(measure)) is not None]
    if not rows:
        return None
    ends = [end for _, each in rows for end in (each.value, *_ends(each.over_seeds), *_ends(each.over_documents))]
    axis = Axis.around("", [0.0, *ends])

    def place(interval: Interval | None) -> tuple[float, float] | None:
        if interval is None:
            return None
        low, high = axis.place(_ends(interval), _LEFT, _RIGHT).tolist()
        return low, high

    spans = tuple(
        Span(
            cell,
            _TOP + _ROW * (index + 0.5),
            float(axis.place(each.value, _LEFT, _RIGHT)),
            place(each.over_seeds),
            place(each.over_documents),
            f"{each.value:+.4f}, {verdict(each)}",
        )
        for index, (cell, each) in enumerate(rows)
    )
    ticks = tuple((float(axis.place(value, _LEFT, _RIGHT)), text) for value, text in axis.ticks)
    zero = float(axis.place(0.0, _LEFT, _RIGHT))
    return Differences(spans, zero, ticks, _TOP + _ROW * len(rows))


def _ends(interval: Interval | None) -> list[float]:
    return [] if interval is None else [interval.low, interval.high]


def _curves(grid: GridConfig, outcomes: Mapping[tuple[str, int], Outcome]) -> list[Chart]:
    """Draw the held-out loss of each cell over the tokens learnt, as a mean over its seeds; the first eight cells."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for cell in grid.all_cells:
        curves = [each.curve for (name, _), each in outcomes.items() if name == cell.name]
        if curves and len(lines) < _MOST_CURVES:
            lines[cell.name] = _mean_curve(curves)
    if not lines:
        return []
    tokens = np.concatenate([line[0] for line in lines.values()])
    losses = np.concatenate([line[1] for line in lines.values()])
    x, y = Axis.around("tokens learnt", [0.0, *tokens]), Axis.around("", losses)
    return [line_chart(title_of(LOSS), x, y, lines)]


def _mean_curve(curves: Sequence[Sequence[Point]]) -> tuple[list[float], list[float]]:
    """Average curves point by point, as all seeds look at the same steps."""
    points = list(zip(*curves, strict=False))
    mean = [np.mean([[point.tokens, point.loss] for point in each], axis=0).tolist() for each in points]
    return [tokens for tokens, _ in mean], [loss for _, loss in mean]
