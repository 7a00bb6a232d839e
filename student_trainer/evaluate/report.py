"""The page of an evaluation. It needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.cache.errors import StoreError
from potstill.cache.upkeep.charts import Axis, Chart, IntervalChart, interval_chart, line_chart, pages_of, with_dots
from potstill.student_trainer.evaluate.evidence import Evidence, Part
from potstill.student_trainer.evaluate.means import Measure
from potstill.student_trainer.evaluate.samples import Sample, Writing
from potstill.student_trainer.evaluate.shown_text import FILTERS
from potstill.student_trainer.evaluate.tables import headline, parts, tasks as task_table, teachers
from potstill.student_trainer.evaluate.tasks.outcome import TaskOutcomes

_HALF_95 = 1.96
"""Standard errors of a normal distribution's 95% on either side."""


def write_page(
    file: Path,
    name: str,
    found: Mapping[str, Evidence],
    writings: Sequence[Writing],
    samples: Sequence[Sample],
    tasks: TaskOutcomes | None = None,
) -> None:
    """Write the page.

    Args:
        file: it is replaced.
        name: of the student.
        found: evidence, by what it was found on.
        writings: of the student.
        samples: of the student and its teachers.
        tasks: scores in the harness's tasks.

    Raises:
        StoreError: the file cannot be written.
    """
    sets = [_section(title, evidence) for title, evidence in found.items()]
    pages = pages_of("potstill.student_trainer.evaluate")
    pages.filters.update(FILTERS)
    page = pages.get_template("evaluate.html.jinja").render(
        name=name,
        headline=headline(found) if found else None,
        sets=sets,
        writings=writings,
        samples=samples,
        tasks=None if tasks is None else _tasks(tasks),
    )
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"--html {str(file)!r} cannot be written: {error}") from error


def _section(title: str, evidence: Evidence) -> dict[str, Any]:
    charts = [_by_part("loss by kind of the next token", evidence.by_category)]
    if evidence.by_source:
        charts.append(_by_part("loss by source", evidence.by_source))
    return {
        "title": title,
        "evidence": evidence,
        "charts": [chart for chart in charts if chart is not None],
        "reliability": _reliability(evidence) if evidence.bins else None,
        "teachers": teachers(evidence) if evidence.teachers else None,
        "by_category": parts("next token", evidence.by_category),
        "by_source": parts("source", evidence.by_source) if evidence.by_source else None,
    }


def _tasks(found: TaskOutcomes) -> dict[str, Any]:
    metrics = dict.fromkeys(metric for task in found.tasks.values() for metric in task.scores)
    charts = [chart for chart in (_by_task(metric, found) for metric in metrics) if chart is not None]
    return {"found": found, "table": task_table(found), "charts": charts}


def _by_task(metric: str, found: TaskOutcomes) -> IntervalChart | None:
    """Draw a metric of the tasks that have it, if there are several."""
    measures = {name: task.scores[metric].measure for name, task in found.tasks.items() if metric in task.scores}
    values = {name: (each.value, _half(each)) for name, each in measures.items() if math.isfinite(each.value)}
    return interval_chart(f"{metric} by task", "with 95% intervals", values) if len(values) > 1 else None


def _by_part(title: str, found: Mapping[str, Part]) -> IntervalChart | None:
    values = {name: (part.loss.value, _half(part.loss)) for name, part in found.items() if part.loss is not None}
    return interval_chart(title, "nats a token, with 95% intervals", values) if len(values) > 1 else None


def _reliability(evidence: Evidence) -> Chart:
    unit = [0.0, 1.0]
    axes = Axis.around("confidence", unit, percent=True), Axis.around("", unit, percent=True)
    chart = line_chart("how often the likeliest token comes, by confidence", *axes, {"perfect": (unit, unit)})
    most = max(each.tokens for each in evidence.bins)
    return with_dots(
        chart,
        [
            (each.confidence, each.accuracy.value, _half(each.accuracy), 2.0 + 3.5 * math.sqrt(each.tokens / most))
            for each in evidence.bins
        ],
    )


def _half(measure: Measure) -> float:
    return _HALF_95 * (measure.stderr or 0.0)
