"""The page of `potstill inspect --html`: one file with its own style and drawings, nothing to load.

Shape legend:  P positions, K kept entries, S shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.types import Fields
from potstill.cache.upkeep.drift import sample_rows
from potstill.cache.upkeep.inspection import Inspection, SetSummary, against_text, fields_text

# A strip of 10^5 shards is drawn with as many marks as one of 240.
_BINS = 240
_HISTOGRAM_BINS = 32
_SAMPLE_ROWS = 32
# An array has the same colour in every set; those without one are small.
_HUES = {
    **dict.fromkeys(("ids", "coded"), 0),
    **dict.fromkeys(("gaps", "logprobs"), 1),
    "log_tail": 2,
    "label_logprob": 3,
    **dict.fromkeys(("draw_gaps", "draws_coded", "draw_ids"), 4),
    **dict.fromkeys(("draw_counts", "draw_starts"), 5),
    **dict.fromkeys(("entropy", "log_z", "dense"), 6),
}
_WIDTH, _HEIGHT = 420, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 30


def page(cache: Cache, inspection: Inspection) -> str:
    """The whole page; reads some rows of every target set for the mass that is kept by rank."""
    found = inspection.to_json
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        *(_section("Cannot be read, and not counted", _text(line), "") for line in found["unreadable"]),
        _corpora(found["corpora"]),
        _section("Coverage", "Which shards have targets, from the first to the last.", _coverage(inspection)),
        _section("Targets", "", _sets(inspection)),
        _section(
            "Mass kept by rank", f"Mean over the positions of up to {_SAMPLE_ROWS} rows.", _mass(cache, inspection)
        ),
        _section("Encoding error", "Measured when each shard was encoded.", _errors(inspection)),
        _section("Size", "Stored bytes a position, by array.", _sizes(inspection)),
        _section("Journals", "", _journals(found["journals"])) if found["journals"] else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(cache.root.url)}: potstill cache</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{_text(cache.root.url)}</h1><p>{_summary(found)} &middot; {when}</p></header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _summary(found: dict[str, Any]) -> str:
    positions = sum(about["positions"] for about in found["corpora"].values())
    stored = sum(about["bytes"] for of in found["targets"].values() for about in of.values())
    return (
        f"{_count(len(found['corpora']), 'corpus', 'corpora')} of {positions:,} positions, "
        f"{_count(len(found['targets']), 'teacher', 'teachers')}, {_bytes(stored)} of targets"
    )


def _corpora(corpora: dict[str, Any]) -> str:
    rows = [
        (
            name,
            *(f"{about[key]:,}" for key in ("rows", "positions", "shards", "duplicate_rows")),
            _bytes(about["bytes"]),
            about["tokenizer_sha256"][:12],
            ", ".join(about["annotations"]) or "-",
        )
        for name, about in corpora.items()
    ]
    head = ("corpus", "rows", "positions", "shards", "duplicates", "stored", "tokenizer", "annotations")
    return _section("Corpora", "", _table(head, rows))


def _coverage(inspection: Inspection) -> str:
    lines = []
    for (teacher, corpus), sets in inspection.sets.items():
        for each in sets:
            done, shards = int(each.covered.sum()), len(each.covered)
            lines.append(
                f"<tr><th>{_text(teacher)}</th><td>{_text(corpus)}</td><td>{_text(each.name)}</td>"
                f'<td class="wide">{coverage_strip(each.covered)}</td><td class="number">{done:,}/{shards:,}</td></tr>'
            )
    head = "<tr><th>teacher</th><th>corpus</th><th>set</th><th>shards</th><th></th></tr>"
    return f'<div class="scroll"><table class="coverage">{head}{"".join(lines)}</table></div>' if lines else _nothing()


def coverage_strip(covered: NDArray[np.bool_]) -> str:
    """Bins of neighbouring shards, the share that is covered as opacity; equal neighbours are one mark."""
    bins = min(_BINS, len(covered))
    edges = np.arange(bins + 1) * len(covered) // bins
    done = np.concatenate([[0], np.cumsum(covered)])
    shares = np.diff(done[edges]) / np.diff(edges)
    marks, start = [], 0
    for share, run in groupby(np.round(shares, 2).tolist()):
        length = len(list(run))
        if share:
            marks.append(f'<rect x="{start}" width="{length}" height="10" fill-opacity="{0.25 + 0.75 * share:.2f}"/>')
        start += length
    label = f"{covered.mean():.0%} of the shards are covered"
    return (
        f'<svg class="strip" viewBox="0 0 {bins} 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(marks)}</svg>"
    )


def _sets(inspection: Inspection) -> str:
    rows = []
    for (teacher, corpus), sets in inspection.sets.items():
        for each in sets:
            about = each.to_json()
            made = "; ".join(f"{p['engine']} {p['engine_version']} on {p['device']}" for p in about["provenance"])
            error = each.worst_error
            rows.append(
                (
                    teacher,
                    corpus,
                    each.name,
                    each.segments.spec.identity.model,
                    fields_text(each.segments.spec.fields),
                    about["encoding"]["name"],
                    f"{about['encoding']['max_abs_error']:g}",
                    _number(error.get("max_abs"), ".4f"),
                    _number(error.get("mean_kl"), ".1e"),
                    against_text(about["measured_against"]),
                    "yes" if each.folded else "no",
                    made or "-",
                    " to ".join(dict.fromkeys((each.first_captured[:10], each.last_captured[:10]))) or "-",
                )
            )
    head = ("teacher", "corpus", "set", "model", "fields", "encoding", "its bound", "max |Δ|", "mean KL")
    tail = ("measured against", "folded", "captured by", "captured")
    return _table((*head, *tail), rows) if rows else _nothing()


def _mass(cache: Cache, inspection: Inspection) -> str:
    figures = []
    for teacher, corpus in inspection.sets:
        targets = cache.targets(teacher, corpus)
        if not targets.fields.k or not targets.committed.any():
            continue
        title = f"{teacher} on {corpus}"
        try:
            top_k = targets.top_k_only()
            rows = sample_rows(top_k, _SAMPLE_ROWS, seed=0)
            read = top_k.read_rows(rows, fields=Fields(k=targets.fields.k))
            mass = np.concatenate([np.exp(part.logprobs.astype(np.float64)).cumsum(axis=1) for part in read]).mean(
                axis=0
            )
        except (CorruptSegment, FormatError) as error:
            figures.append(_figure(title, f"<p>{_text(error.detail)}</p>"))
            continue
        figures.append(
            _figure(title, _curve(mass) + f"<p>top {len(mass)} hold {mass[-1]:.2%}, the first {mass[0]:.1%}</p>")
        )
    return _grid(figures)


def _curve(mass: NDArray[np.float64]) -> str:
    """Mean cumulative mass [K] over the rank."""
    low = max(0.0, np.floor(10 * float(mass[0])) / 10)
    ranks = np.arange(1, len(mass) + 1)
    x = _scale(ranks, 1.0, float(max(len(mass), 2)), _LEFT, _WIDTH - _RIGHT)
    y = _scale(np.minimum(mass, 1.0), low, 1.0, _HEIGHT - _BOTTOM, _TOP)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = (
        "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(x, y, strict=True))
        if len(mass) < 9
        else ""
    )
    vertical = [(low + (1 - low) * i / 4, f"{low + (1 - low) * i / 4:.0%}") for i in range(5)]
    shown = sorted({1, *(round(len(mass) * i / 4) for i in range(1, 5)), len(mass)} - {0})
    horizontal = [(float(at), str(at)) for at in shown]
    axes = _axes(horizontal, vertical, (1.0, float(max(len(mass), 2))), (low, 1.0), "rank")
    return _svg(f"{axes}<polyline class='line' points='{line}'/>{dots}", "mean cumulative mass by rank")


def _errors(inspection: Inspection) -> str:
    figures = []
    for (teacher, corpus), sets in inspection.sets.items():
        for each in sets:
            bound = each.segments.spec.encoding.max_abs_error
            against = "" if each.exact_source else f", against {against_text(each.to_json()['measured_against'])}"
            title = f"{teacher} on {corpus}, {each.name}{against}"
            if "max_abs" in each.errors and not max(each.errors["max_abs"]):
                figures.append(
                    _figure(title, f"<p>{each.segments.spec.encoding.name}: every logprob is kept exactly.</p>")
                )
            elif "max_abs" in each.errors:
                drawn = _histogram(each.errors["max_abs"], "max |Δ logprob| of a shard, nats", bound)
                figures.append(_figure(title, drawn + _saturated(each)))
                figures.append(_figure(title, _histogram(each.errors["mean_kl"], "mean KL of a shard, nats", None)))
    return _grid(figures)


def _saturated(each: SetSummary) -> str:
    count = int(sum(each.errors.get("saturated", ())))
    return f"<p>{count:,} entries did not fit their code</p>" if count else ""


def _histogram(values: Sequence[float], label: str, bound: float | None) -> str:
    """Shards by their error, with a line at what the encoding promises."""
    end = max(*values, bound or 0.0) * 1.08 or 1.0
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS, range=(0.0, end))
    x = _scale(edges, 0.0, end, _LEFT, _WIDTH - _RIGHT)
    y = _scale(counts, 0.0, float(max(counts.max(), 1)), _HEIGHT - _BOTTOM, _TOP)
    bars = "".join(
        f'<rect class="bar" x="{a:.1f}" y="{top:.1f}" width="{b - a - 1:.1f}" height="{_HEIGHT - _BOTTOM - top:.1f}"/>'
        for a, b, top, count in zip(x[:-1], x[1:], y, counts, strict=True)
        if count
    )
    line = ""
    if bound:
        (at,) = _scale(np.array([bound]), 0.0, end, _LEFT, _WIDTH - _RIGHT)
        line = (
            f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text class="bound" x="{at - 4:.1f}" y="{_TOP + 10}" text-anchor="end">bound {bound:g}</text>'
        )
    ticks = [(at, f"{at:.3g}") for at in _round_ticks(end)]
    most = int(max(counts.max(), 1))
    vertical = [(float(at), f"{at:,}") for at in sorted({0, most // 2, most})]
    return _svg(_axes(ticks, vertical, (0.0, end), (0.0, float(most)), label) + bars + line, label)


def _round_ticks(end: float) -> list[float]:
    """From 0 on, up to six, at steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(end))
    step = next(size * power for size in (0.2, 0.5, 1.0, 2.0) if end / (size * power) <= 5)
    return [step * index for index in range(int(end / step) + 1)]


def _sizes(inspection: Inspection) -> str:
    widest = max((each.bytes_per_position or 0 for sets in inspection.sets.values() for each in sets), default=0)
    if not widest:
        return _nothing()
    rows = [
        _size_row(teacher, corpus, each, widest)
        for (teacher, corpus), sets in inspection.sets.items()
        for each in sets
        if each.positions
    ]
    return f'<div class="sizes">{"".join(rows)}</div>'


def _size_row(teacher: str, corpus: str, each: SetSummary, widest: float) -> str:
    parts = [(name, stored / each.positions) for name, stored in each.array_bytes.most_common()]
    bars, legend, start = [], [], 0.0
    for name, size in parts:
        hue = f"s{_HUES.get(name, 7)}"
        bars.append(
            f'<rect class="{hue}" x="{start:.3f}" width="{size:.3f}" height="10"><title>{_text(name)}</title></rect>'
        )
        legend.append(f'<span><i class="{hue}"></i>{_text(name)} {size:,.2f}</span>')
        start += size
    total = each.bytes_per_position or 0.0
    return (
        f"<div><h3>{_text(teacher)} on {_text(corpus)}, {_text(each.name)}: {total:,.1f} bytes/position, "
        f"{_bytes(each.num_bytes)}</h3>"
        f'<svg class="strip" viewBox="0 0 {widest:.3f} 10" preserveAspectRatio="none" role="img" '
        f'aria-label="bytes by array">{"".join(bars)}</svg><p class="legend">{"".join(legend)}</p></div>'
    )


def _journals(journals: dict[str, Any]) -> str:
    rows = [
        (teacher, *(f"{about[key]:,}" for key in ("segments", "rows", "positions")), _bytes(about["bytes"]))
        for teacher, about in journals.items()
    ]
    return _table(("teacher", "segments", "rows", "positions", "stored"), rows)


def _axes(
    horizontal: Sequence[tuple[float, str]],
    vertical: Sequence[tuple[float, str]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    label: str,
) -> str:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value, text in vertical:
        (y,) = _scale(np.array([value]), *y_range, bottom, _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in horizontal:
        (x,) = _scale(np.array([value]), *x_range, _LEFT, _WIDTH - _RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{text}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">{_text(label)}</text>')
    return "".join(parts)


def _scale(values: NDArray[Any], low: float, high: float, start: float, end: float) -> NDArray[np.float64]:
    return start + (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12) * (end - start)


def _svg(content: str, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">{content}</svg>'


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{_text(title)}</figcaption>{content}</figure>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else _nothing()


def _section(title: str, words: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{words}</p>' if words else ''}{content}</section>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td{_align(cell)}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _align(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() and not set(cell) - set("0123456789.,/e-+ KMGTiB") else ""


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _nothing() -> str:
    return '<p class="nothing">nothing yet</p>'


def _text(value: object) -> str:
    return escape(str(value))


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--dim:#5f6b7a;--rule:#dde2e8;--mark:#1f6feb;--empty:#e9edf2;
--bound:#c4432b}
@media (prefers-color-scheme:dark){:root{--bg:#12161b;--fg:#e3e8ee;--dim:#93a0b0;--rule:#2c343e;--mark:#5aa2ff;
--empty:#232a33;--bound:#ff8a70}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:14px/1.45 system-ui,sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:24px}
h1{font-size:20px;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:32px 0 4px}
h3{font-size:13px;font-weight:600;margin:14px 0 4px}
p{margin:0 0 8px;color:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{padding:5px 12px 5px 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
tr:first-child th{color:var(--dim);font-weight:500}
.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.coverage td,.coverage th{vertical-align:middle}
.coverage th{font-weight:500}
.wide{width:60%;min-width:240px}
.strip{display:block;width:100%;height:18px;background:var(--empty);border-radius:3px;fill:var(--mark)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:20px;margin-top:8px}
figure{margin:0}
figcaption{font-weight:600;font-size:13px;margin-bottom:4px}
.chart{display:block;width:100%;height:auto}
.chart text{fill:var(--dim);font-size:11px}
.chart line.grid{stroke:var(--rule)}
.chart .line{fill:none;stroke:var(--mark);stroke-width:2}
.chart circle,.chart .bar{fill:var(--mark)}
.chart line.bound{stroke:var(--bound);stroke-dasharray:4 3}
.chart text.bound{fill:var(--bound)}
.legend span{display:inline-block;margin-right:14px;font-size:12px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.s0{fill:#1f6feb;background:#1f6feb}.s1{fill:#d9822b;background:#d9822b}.s2{fill:#2f9e5f;background:#2f9e5f}
.s3{fill:#a452c9;background:#a452c9}.s4{fill:#c4432b;background:#c4432b}.s5{fill:#178a9c;background:#178a9c}
.s6{fill:#8a7a2a;background:#8a7a2a}.s7{fill:#7a8594;background:#7a8594}
"""
