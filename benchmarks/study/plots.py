"""Plots of the study as SVG files that look right on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from potstill.cache.upkeep.charts import Axis
from potstill.student_trainer.ablate.intervals import Difference, Interval

_WIDTH, _NAMES, _RIGHT, _ROW, _TOP = 720, 150, 560, 26, 40
_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e08e1b", "#4f5d75", "#17a398", "#a0522d")


def write_differences(file: Path, title: str, found: Mapping[str, Difference]) -> None:
    """Draw differences, one below the other: a thick line over seeds, a thin one over documents, a dot at the mean."""
    ends = [
        end for each in found.values() for end in (each.value, *_ends(each.over_seeds), *_ends(each.over_documents))
    ]
    axis = Axis.around("", [0.0, *ends])
    bottom = _TOP + _ROW * len(found)
    parts = [_text(8, 20, title, bold=True)]
    for value, told in axis.ticks:
        x = _x(axis, value)
        parts += [_line(x, _TOP, x, bottom, "#ccc" if value else "#555", 1), _text(x, bottom + 16, told, middle=True)]
    for i, (name, each) in enumerate(found.items()):
        y = _TOP + _ROW * (i + 0.5)
        parts.append(_text(8, y + 4, name))
        for interval, shift, width in ((each.over_documents, 4, 1.5), (each.over_seeds, -3, 4)):
            if interval is not None:
                parts.append(
                    _line(_x(axis, interval.low), y + shift, _x(axis, interval.high), y + shift, _COLOURS[0], width)
                )
        parts.append(f'<circle cx="{_x(axis, each.value):.1f}" cy="{y:.1f}" r="4" fill="{_COLOURS[1]}"/>')
        parts.append(_text(_RIGHT + 20, y + 4, f"{each.value:+.4f}"))
    _write(file, bottom + 28, parts)


def write_curves(file: Path, title: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw a value over the tokens learnt, a line for each name."""
    points = {name: np.asarray(each, dtype=np.float64) for name, each in curves.items()}
    everything = np.concatenate(list(points.values()))
    across, up = Axis.around("", [0.0, *everything[:, 0]]), Axis.around("", everything[:, 1])
    bottom, left = 300.0, 60.0
    parts = [_text(8, 20, title, bold=True), _text((left + _RIGHT) / 2, bottom + 34, "tokens learnt", middle=True)]
    for value, told in across.ticks:
        x = float(across.place(value, left, _RIGHT))
        parts += [_line(x, _TOP, x, bottom, "#eee", 1), _text(x, bottom + 16, told, middle=True)]
    for value, told in up.ticks:
        y = float(up.place(value, bottom, _TOP))
        parts += [_line(left, y, _RIGHT, y, "#ddd", 1), _text(8, y + 4, told)]
    for i, (name, each) in enumerate(points.items()):
        xs, ys = across.place(each[:, 0], left, _RIGHT), up.place(each[:, 1], bottom, _TOP)
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        colour, dash = _COLOURS[i % len(_COLOURS)], ' stroke-dasharray="5 3"' * (i // len(_COLOURS) % 2)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        y = _TOP + 18 * (i + 0.5)
        parts += [
            f'<polyline points="{_RIGHT + 10},{y} {_RIGHT + 34},{y}" stroke="{colour}" stroke-width="2"{dash}/>',
            _text(_RIGHT + 40, y + 4, name),
        ]
    _write(file, max(bottom + 44, _TOP + 18 * len(points) + 10), parts)


def _ends(interval: Interval | None) -> list[float]:
    return [] if interval is None else [interval.low, interval.high]


def _x(axis: Axis, value: float) -> float:
    return float(axis.place(value, _NAMES, _RIGHT))


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, told: str, *, middle: bool = False, bold: bool = False) -> str:
    more = ' text-anchor="middle"' * middle + ' font-weight="bold"' * bold
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(told)}</text>'


def _write(file: Path, height: float, parts: Sequence[str]) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif"'
    paper = f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#fff"/>'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([f'{head} font-size="12" fill="#222">', paper, *parts, "</svg>", ""]), encoding="utf-8")
