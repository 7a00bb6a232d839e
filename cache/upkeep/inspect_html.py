"""The page of `potstill inspect --html`: figures of a cache, for `pages/inspect.html.jinja` to lay out.

Shape legend:  P positions, K kept entries, S shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from potstill.cache.cache import Cache
from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.plurals import counted
from potstill.cache.types import Fields
from potstill.cache.upkeep.charts import Axis, Chart, histogram, line_chart, pages_of
from potstill.cache.upkeep.drift import sample_rows
from potstill.cache.upkeep.inspection import Inspection, SetSummary, against_text

# A strip of 10^5 shards is drawn with as many marks as one of 240.
_BINS = 240
_HISTOGRAM_BINS = 32
# A histogram of fewer shards tells nothing that the table does not.
_HISTOGRAM_SHARDS = 8
_SAMPLE_ROWS = 32
# An array has the same colour in every set; those without one are small.
_HUES = {
    **dict.fromkeys(("ids", "coded"), 0),
    **dict.fromkeys(("gaps", "logprobs"), 1),
    "log_tail": 2,
    "label_logprob": 3,
    **dict.fromkeys(("draw_gaps", "draws_coded", "draw_ids"), 4),
    **dict.fromkeys(("draw_counts", "draw_starts"), 5),
    **dict.fromkeys(("entropy", "log_z", "dense", "alignment"), 6),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A run of neighbouring bins of a coverage strip in which the same share of shards is committed."""

    start: int
    width: int
    opacity: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One array's bytes a position, as a piece of a stacked bar."""

    name: str
    hue: int
    start: float
    size: float


def page(cache: Cache, inspection: Inspection) -> str:
    """Render the whole page; reads some rows of every target set, for the mass by rank."""
    found = inspection.to_json
    sets = [_describe(teacher, corpus, each) for (teacher, corpus), held in inspection.sets.items() for each in held]
    template = pages_of("potstill.cache.upkeep").get_template("inspect.html.jinja")
    return template.render(
        url=str(cache.root.url),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        found=found,
        positions=sum(about["positions"] for about in found["corpora"].values()),
        stored=sum(about["bytes"] for of in found["targets"].values() for about in of.values()),
        sets=sets,
        widest=max((about["bytes_per_position"] or 0 for about in sets), default=0),
        mass=list(_mass(cache, inspection)),
        sample_rows=_SAMPLE_ROWS,
        size=decimal,
        counted=counted,
    )


def coverage_marks(covered: NDArray[np.bool_]) -> list[Mark]:
    """Mark the committed shards [S] in at most 240 bins; opacity is a bin's share, equal neighbours are one mark."""
    bins = min(_BINS, len(covered))
    edges = np.arange(bins + 1) * len(covered) // bins
    done = np.concatenate([[0], np.cumsum(covered)])
    shares = np.diff(done[edges]) / np.diff(edges)
    marks, start = [], 0
    for share, run in groupby(np.round(shares, 2).tolist()):
        width = len(list(run))
        if share:
            marks.append(Mark(start, width, f"{0.25 + 0.75 * share:.2f}"))
        start += width
    return marks


def _describe(teacher: str, corpus: str, each: SetSummary) -> dict[str, Any]:
    """Values that the page shows of one segment set."""
    about = each.to_json()
    spec = each.segments.spec
    return {
        **about,
        "teacher": teacher,
        "corpus": corpus,
        "model": spec.identity.model,
        "fields": spec.fields.text,
        "bins": min(_BINS, len(each.covered)),
        "marks": coverage_marks(each.covered),
        "share": f"{each.covered.mean():.0%} of the shards are covered",
        "bound": f"{spec.encoding.max_abs_error:g}",
        "errors": {
            name: _spread(each.errors.get(name, []), form) for name, form in (("max_abs", ".4f"), ("mean_kl", ".1e"))
        },
        "against": against_text(about["measured_against"]),
        "saturated": int(sum(each.errors.get("saturated", ()))),
        "histograms": list(_histograms(f"{teacher} on {corpus}, {each.name}", each)),
        "made": "; ".join(f"{p['engine']} {p['engine_version']} on {p['device']}" for p in about["provenance"]),
        "captured": " to ".join(dict.fromkeys((each.first_captured[:10], each.last_captured[:10]))),
        "layers": _layers(each),
    }


def _spread(values: list[float], form: str) -> str:
    """The median and the largest value as text; once when they are the same."""
    if not values:
        return "-"
    return ", at most ".join(dict.fromkeys(format(value, form) for value in (np.median(values), max(values))))


def _layers(each: SetSummary) -> list[Layer]:
    layers, start = [], 0.0
    for name, stored in each.array_bytes.most_common() if each.positions else ():
        size = stored / each.positions
        layers.append(Layer(name, _HUES.get(name, 7), start, size))
        start += size
    return layers


def _mass(cache: Cache, inspection: Inspection) -> Iterator[tuple[Chart | None, str]]:
    """A chart of the mean cumulative mass by rank for each target set, or None and the reason it cannot be read."""
    for teacher, corpus in inspection.sets:
        targets = cache.targets(teacher, corpus)
        if not targets.fields.k or not targets.committed.any():
            continue
        title = f"{teacher} on {corpus}"
        try:
            top_k = targets.top_k_only()
            rows = sample_rows(top_k, _SAMPLE_ROWS, seed=0)
            read = top_k.read_rows(rows, fields=Fields(k=targets.fields.k))
        except (CorruptSegment, FormatError) as error:
            yield None, f"{title}: {error.detail}"
            continue
        sums = np.concatenate([np.exp(part.logprobs.astype(np.float64)).cumsum(axis=1) for part in read])
        mass = np.minimum(sums.mean(axis=0), 1.0)
        k = len(mass)
        ticks = tuple((float(rank), str(rank)) for rank in sorted({1, *(round(k * i / 4) for i in range(1, 5))} - {0}))
        x = Axis("rank", 1.0, max(k, 2.0), ticks)
        # A line needs two points, also where one entry is kept.
        points = (np.arange(1, k + 1), mass) if k > 1 else ([1, 2], [mass[0]] * 2)
        chart = line_chart(title, x, Axis.around("", [mass[0], 1.0], percent=True), {"": points})
        yield chart, f"the top {k} hold {mass[-1]:.2%}, the first {mass[0]:.1%}"


def _histograms(title: str, each: SetSummary) -> Iterator[Chart]:
    """Histograms of the shards' errors, when there are enough shards and not all errors are zero."""
    bound = each.segments.spec.encoding.max_abs_error
    largest = each.errors.get("max_abs", [])
    if len(largest) < _HISTOGRAM_SHARDS or not max(largest):
        return
    yield histogram(title, "largest |Δ logprob| of a shard, nats", largest, bins=_HISTOGRAM_BINS, bound=bound)
    if max(each.errors["mean_kl"]):
        yield histogram(title, "mean KL of a shard, nats", each.errors["mean_kl"], bins=_HISTOGRAM_BINS)
