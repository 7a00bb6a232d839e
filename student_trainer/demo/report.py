"""The demo's report: report.json for programs, report.html for people. The page needs nothing but itself."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

_COLOURS = {"cross-entropy": "#c2571a", "distilled": "#1a6fc2"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 260, 46, 34

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.context { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; background: #f6f6f6;
  padding: .5rem .8rem; }
.next { background: #ffe08a; }
.guess { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
"""


def write_report(folder: Path, report: dict[str, Any], *, page: bool = True) -> None:
    """Write the page, then `report.json`: the latter says that the demo is finished."""
    if page:
        (folder / "report.html").write_text(_page(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> str:
    students = report["students"]
    charts = _chart("held-out loss (nats/token)", students, "held_out_loss") + _chart(
        "KL to the teacher on held-out rows (nats/token)", students, "kl_to_teacher"
    )
    parts = (
        "<h1>Potstill demo</h1>",
        f"<p>{escape(_summary(report))}</p>",
        _student_table(students),
        f'<div class="charts">{charts}</div>',
        "<h2>What comes next?</h2>",
        "<p>Held-out text; the token that really follows is marked. Probabilities in percent.</p>",
        *(_sample(sample) for sample in report["samples"]),
        "<h2>Where the time went</h2>",
        _seconds_table(report["seconds"]),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Potstill demo</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(report: dict[str, Any]) -> str:
    corpus, targets, plan = report["corpus"], report["targets"], report["plan"]
    return (
        f"{report['teacher']['model']} scored {corpus['positions']:,} positions once; its top-{targets['k']} is kept "
        f"in {targets['bytes_per_position']:.1f} bytes a position ({targets['encoding']['name']}, largest error "
        f"{targets['max_abs_error']:.3f} nats). Two students of {plan['layers']} layers were trained from the same "
        f"weights on the same rows in the same order for {plan['steps']} steps: one on cross-entropy, one on the "
        f"teacher's targets."
    )


def _student_table(students: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td style="color:{_COLOURS[name]}">{escape(name)}</td><td class="number">{s["held_out_loss"]:.4f}</td>'
        f'<td class="number">{s["kl_to_teacher"]:.4f}</td><td class="number">{s["top1_agreement"]:.1%}</td></tr>'
        for name, s in students.items()
    )
    head = "<tr><th>student</th><th>held-out loss</th><th>KL to the teacher</th><th>same top-1 as the teacher</th></tr>"
    return f"<table>{head}{rows}</table>"


def _seconds_table(seconds: dict[str, float]) -> str:
    rows = "".join(f'<tr><td>{escape(n)}</td><td class="number">{s:.1f} s</td></tr>' for n, s in seconds.items())
    total = f'<tr><th>all</th><td class="number">{sum(seconds.values()):.1f} s</td></tr>'
    return f"<table>{rows}{total}</table>"


def _sample(sample: dict[str, Any]) -> str:
    columns = "".join(
        f"<td><b>{escape(name)}</b><br>" + "<br>".join(_guess(guess) for guess in guesses) + "</td>"
        for name, guesses in sample["guesses"].items()
    )
    following = f'<span class="next">{escape(_visible(sample["next_text"]))}</span>'
    return f'<div class="context">{escape(sample["context"])}{following}</div><table><tr>{columns}</tr></table>'


def _guess(guess: dict[str, Any]) -> str:
    return f'<span class="guess">{100 * guess["probability"]:5.1f}  {escape(_visible(guess["text"]))}</span>'


def _visible(token: str) -> str:
    return token.replace("\n", "\u23ce") if token.strip(" ") else token.replace(" ", "\u2423")


def _chart(title: str, students: dict[str, Any], key: str) -> str:
    curves = {name: [(point["step"], point[key]) for point in s["curve"]] for name, s in students.items()}
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = min(v for _, v in points), max(v for _, v in points)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(step: float, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 10) * step / last
        y = 24 + (_HEIGHT - _BOTTOM - 24) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{_COLOURS[name]}" stroke-width="2" '
        f'points="{" ".join(place(*point) for point in curve)}"/>'
        for name, curve in curves.items()
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(title)}" font-size="12">'
        f'<text x="{_LEFT}" y="14" font-weight="bold">{escape(title)}</text>'
        f"{_axes(low, high, last)}{lines}</svg>"
    )


def _axes(low: float, high: float, last: int) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 10
    parts = [f'<path d="M{_LEFT} 24V{bottom}H{right}" fill="none" stroke="#888"/>']
    for i in range(5):
        value = low + (high - low) * i / 4
        y = bottom - (bottom - 24) * i / 4
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.2f}</text>')
        parts.append(f'<path d="M{_LEFT} {y:.0f}H{right}" stroke="#eee"/>')
    for i in range(5):
        x = _LEFT + (right - _LEFT) * i / 4
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{last * i // 4}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 2}" text-anchor="end">step</text>')
    return "".join(parts)
