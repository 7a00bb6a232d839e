"""The demo's report: report.json for programs, report.html for people. The page needs nothing but itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from potstill.cache.upkeep.charts import Axis, Chart, line_chart, pages_of
from potstill.student_trainer.evaluate.shown_text import FILTERS


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the page, then `report.json`: the latter says that the demo is finished."""
    (folder / "report.html").write_text(report_page(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def report_page(report: dict[str, Any]) -> str:
    """The page of a report; all that it shows is in the report."""
    charts = [
        _chart("held-out loss, nats a token", report["students"], "held_out_loss"),
        _chart("KL to the teacher on held-out rows, nats a token", report["students"], "kl_to_teacher"),
    ]
    pages = pages_of("potstill.student_trainer.demo", "potstill.student_trainer.evaluate")
    pages.filters.update(FILTERS)
    return pages.get_template("report.html.jinja").render(report=report, charts_of_students=charts)


def _chart(title: str, students: dict[str, Any], key: str) -> Chart:
    lines = {
        name: ([point["step"] for point in student["curve"]], [point[key] for point in student["curve"]])
        for name, student in students.items()
    }
    steps, values = ([number for line in lines.values() for number in line[axis]] for axis in (0, 1))
    return line_chart(title, Axis.around("step", [0, *steps]), Axis.around("", values), lines)
