"""Evidence as tables of texts, which the terminal and the page show alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from potstill.student_trainer.evaluate.evidence import Evidence, Part
from potstill.student_trainer.evaluate.means import Measure
from potstill.student_trainer.evaluate.tasks.outcome import TaskOutcomes

_TEXT = {
    "loss": "cross-entropy, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "top1": "next token found likeliest",
    "ece": "expected calibration error",
}
_TEACHER = {
    "kl": "KL(teacher, student), top-k + tail",
    "full_kl": "KL(teacher, student), exact",
    "reverse_kl": "KL(student, teacher), exact",
    "total_variation": "total variation",
    "acceptance": "acceptance rate",
    "top1": "same likeliest token",
    "overlap": "overlap of the top K",
    "mass": "student's mass on the top K",
}
_DIRECTION = {True: "\u2191", False: "\u2193", None: ""}
_MOST_DIGITS = 6
_SHARES = {"ece", "total_variation", "acceptance", "top1", "overlap", "mass"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under headings."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def measure_text(measure: Measure | None, *, share: bool = False) -> str:
    """Write `value ± stderr` with two digits of the error; shares in percent, `-` where nothing was measured."""
    if measure is None or not math.isfinite(measure.value):
        return "-" if measure is None else "over 1e308"
    scale, sign = (100.0, "%") if share else (1.0, "")
    value, error = scale * measure.value, None if measure.stderr is None else scale * measure.stderr
    if error is None or not math.isfinite(error):
        return f"{value:,.4g}{sign}"
    if error == 0.0:
        return f"{value:,.4g}{sign} \u00b1 0"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > _MOST_DIGITS:
        return f"{value:.4g}{sign} \u00b1 {error:.1g}"
    return f"{value:,.{digits}f}{sign} \u00b1 {error:,.{digits}f}"


def headline(found: Mapping[str, Evidence]) -> Table:
    """Make a line for each measure of the text, a column for each set of rows."""
    rows = [
        ("rows", *(f"{each.rows:,}" for each in found.values())),
        ("documents", *(f"{each.documents:,}" for each in found.values())),
        ("labels", *(f"{each.all.tokens:,}" for each in found.values())),
    ]
    for name, words in _TEXT.items():
        measures = [each.ece if name == "ece" else each.measured[name] for each in found.values()]
        rows.append((words, *(measure_text(measure, share=name in _SHARES) for measure in measures)))
    return Table(("", *found), tuple(rows))


def teachers(evidence: Evidence) -> Table:
    """Make a line for each measure against teachers, a column for each of them."""
    rows = [
        (words, *(measure_text(each[name], share=name in _SHARES) for each in evidence.teachers.values()))
        for name, words in _TEACHER.items()
    ]
    return Table(("", *evidence.teachers), tuple(rows))


def parts(heading: str, found: Mapping[str, Part]) -> Table:
    """Make a line for each part of the labels, with the KL to the first teacher."""
    teacher = next((name for part in found.values() for name in part.kl), None)
    rows = [
        (
            name,
            f"{part.tokens:,}",
            measure_text(part.loss),
            measure_text(part.top1, share=True),
            *([measure_text(part.kl[teacher])] if teacher is not None else []),
        )
        for name, part in found.items()
    ]
    more = () if teacher is None else (f"KL of {teacher}",)
    return Table((heading, "labels", "nats a token", "likeliest", *more), tuple(rows))


def tasks(found: TaskOutcomes) -> Table:
    """Make a line for each metric of each task; an arrow up where more is better, down where less is."""
    rows = [
        (
            name,
            "-" if task.questions is None else f"{task.questions:,}",
            "-" if task.shots is None else str(task.shots),
            f"{metric} {_DIRECTION[score.higher_is_better]}".rstrip(),
            measure_text(score.measure),
        )
        for name, task in found.tasks.items()
        for metric, score in task.scores.items()
    ]
    return Table(("task", "questions", "shots", "metric", "value"), tuple(rows))
