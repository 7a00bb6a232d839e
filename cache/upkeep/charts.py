"""Charts for HTML pages: axes with round ticks, and lines and bars between them, in SVG units.

`pages/charts.html.jinja` draws them. A page is one file with its own style and drawings that loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from numpy.typing import ArrayLike, NDArray

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 408, 18, 160
_MOST_STEPS = 5
_NAMES, _ROW = 150, 22


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Values, each with the text at it."""

    @classmethod
    def around(cls, label: str, values: ArrayLike, *, percent: bool = False) -> Axis:
        """Make an axis that ends at round numbers around all values."""
        found = np.asarray(values, dtype=np.float64)
        low, high = float(found.min()), float(found.max())
        step = _round_step((high - low) or abs(high) or 1.0)
        # 1e-9: a value that rounding puts just beside a tick must not add another one.
        first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
        last = max(last, first + 1)
        # As many digits as tell neighbouring ticks apart.
        digits = max(0, -int(np.floor(np.log10(step) + 1e-9)) - (2 if percent else 0))
        form = f".{digits}%" if percent else f",.{digits}f" if digits < 4 else ".1e"
        texts = {index: format(step * index, form) for index in range(first, last + 1)} | {0: "0%" if percent else "0"}
        ticks = tuple((step * index, texts[index]) for index in range(first, last + 1))
        return cls(label, ticks[0][0], ticks[-1][0], ticks)

    def place(self, values: ArrayLike, start: float, end: float) -> NDArray[np.float64]:
        """Convert values to SVG units, `start` to `end` being the ends of the axis."""
        return start + (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low) * (end - start)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, from the lower axis up."""

    x: float
    width: float
    y: float


@dataclass(frozen=True, slots=True)
class Dot:
    """One value with its interval, upright."""

    x: float
    y: float
    low: float
    high: float
    radius: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines, bars and dots on two axes, in the units of its drawing."""

    title: str
    x: Axis
    y: Axis
    lines: Mapping[str, str]
    """SVG points of each line, by its name in the legend."""
    bars: tuple[Bar, ...] = ()
    bound: tuple[float, str] | None = None
    """Place of an upright line, and the text above it."""
    dots: tuple[Dot, ...] = ()

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Place of each tick of the lower axis, and its text."""
        return [(float(self.x.place(value, _LEFT, _RIGHT)), text) for value, text in self.x.ticks]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Place of each tick of the left axis, and its text."""
        return [(float(self.y.place(value, _BOTTOM, _TOP)), text) for value, text in self.y.ticks]


@dataclass(frozen=True, slots=True)
class NamedInterval:
    """One value with its interval, lying, beside its name."""

    name: str
    y: float
    x: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class IntervalChart:
    """Values with intervals, one below the other, in the units of its drawing."""

    title: str
    x: Axis
    rows: tuple[NamedInterval, ...]

    @property
    def bottom(self) -> float:
        """Place of the lower axis."""
        return _TOP + _ROW * len(self.rows)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Place of each tick of the axis, and its text."""
        return [(float(self.x.place(value, _NAMES, _RIGHT)), text) for value, text in self.x.ticks]


def interval_chart(title: str, label: str, values: Mapping[str, tuple[float, float]]) -> IntervalChart:
    """Draw named values, each with half the width of its interval."""
    ends = [edge for value, half in values.values() for edge in (value - half, value + half)]
    x = Axis.around(label, ends)
    rows = []
    for i, (name, (value, half)) in enumerate(values.items()):
        places = x.place([value, value - half, value + half], _NAMES, _RIGHT).tolist()
        rows.append(NamedInterval(name, _TOP + _ROW * (i + 0.5), *places))
    return IntervalChart(title, x, tuple(rows))


def line_chart(title: str, x: Axis, y: Axis, lines: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Chart:
    """Draw lines, each of x and y values of one length."""
    points = {
        name: " ".join(
            f"{a:.1f},{b:.1f}" for a, b in zip(x.place(xs, _LEFT, _RIGHT), y.place(ys, _BOTTOM, _TOP), strict=True)
        )
        for name, (xs, ys) in lines.items()
    }
    return Chart(title, x, y, points)


def with_dots(chart: Chart, dots: Sequence[tuple[float, float, float, float]]) -> Chart:
    """Add values to a chart, each x, y, half the width of its interval and its radius; cut at the axes."""
    drawn = []
    for x, y, half, radius in dots:
        heights = np.clip([y, y - half, y + half], chart.y.low, chart.y.high)
        place, (middle, low, high) = chart.x.place(x, _LEFT, _RIGHT), chart.y.place(heights, _BOTTOM, _TOP).tolist()
        drawn.append(Dot(float(place), middle, low, high, radius))
    return replace(chart, dots=tuple(drawn))


def histogram(title: str, label: str, values: Sequence[float], *, bins: int, bound: float | None = None) -> Chart:
    """Draw the counts of values of at least 0 in each of `bins` bins, and an upright line at `bound`."""
    x = Axis.around(label, [0.0, *values, bound or 0.0])
    counts, edges = np.histogram(values, bins=bins, range=(0.0, x.high))
    y = Axis.around("", [0, counts.max()])
    lefts, tops = x.place(edges, _LEFT, _RIGHT), y.place(counts, _BOTTOM, _TOP)
    bars = tuple(
        Bar(float(a), float(b - a - 1), float(top))
        for a, b, top, count in zip(lefts[:-1], lefts[1:], tops, counts, strict=True)
        if count
    )
    line = (float(x.place(bound, _LEFT, _RIGHT)), f"bound {bound:g}") if bound else None
    return Chart(title, x, y, {}, bars, line)


def pages_of(*packages: str) -> Environment:
    """Load the templates in `pages/` of packages, which may import those of this one; every value is escaped."""
    loaders = [PackageLoader(name, "pages") for name in (*packages, __package__ or "")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    frame: dict[str, Any] = {"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM, "names": _NAMES}
    environment.globals.update(frame=frame)
    return environment


def _round_step(width: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that divides `width` into at most `_MOST_STEPS` parts."""
    power = 10.0 ** np.floor(np.log10(width))
    return float(next(size * power for size in (0.2, 0.5, 1.0, 2.0) if width / (size * power) <= _MOST_STEPS))
