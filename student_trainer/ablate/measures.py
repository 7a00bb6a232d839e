"""Measures of a student, by name, and how they are shown: in sections, with a title and what they are counted over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOSS = "loss"
"""Cross-entropy in nats a token."""
KL = "kl "
"""Begins the name of the KL to a teacher in nats a token."""
TOP1 = "top1"
"""Share of positions at which the likeliest token is the next one; `top1 NAME`: is a teacher's likeliest."""
ECE = "ece"
"""Expected calibration error."""
OVERCONFIDENCE = "overconfidence"
"""Mean confidence less the share of right ones."""
TASK = "task "
"""Begins the name of a metric of a task."""

_TITLES = {
    LOSS: "held-out loss, nats a token",
    TOP1: "next token found likeliest, share",
    ECE: "expected calibration error",
    OVERCONFIDENCE: "overconfidence, mean confidence less share right",
}
ARROWS = {True: " \u2191", False: " \u2193", None: ""}
"""Put behind a title: up where more of it is better, down where less is."""


@dataclass(frozen=True, slots=True)
class Section:
    """Measures that are shown together."""

    title: str
    about: str
    """Words on what they tell."""
    measures: tuple[str, ...]


def sections_of(measures: Iterable[str]) -> list[Section]:
    """Put measures into sections; those that agree with a teacher's likeliest token are in JSON alone."""
    names = sorted(measures)
    found = [
        Section(
            "What each choice is worth",
            "How well a student knows the held-out text, and how near it came to each teacher.",
            (*(each for each in names if each == LOSS), *(each for each in names if each.startswith(KL))),
        ),
        Section(
            "Calibration",
            "Is a student right as often as it is sure to be? The calibration error is the mean over positions of how "
            "far the confidence of their bin is from its share of right ones; it is too high where bins hold few. "
            "Confidence less the share right says to which side.",
            tuple(each for each in (TOP1, ECE, OVERCONFIDENCE) if each in names),
        ),
        Section(
            "Tasks",
            "Means over questions, as potstill evaluate --tasks gives them.",
            tuple(each for each in names if each.startswith(TASK)),
        ),
    ]
    return [each for each in found if each.measures]


def title_of(measure: str) -> str:
    """Name a measure with its unit."""
    if measure.startswith(KL):
        return f"KL to {measure.removeprefix(KL)}, nats a token"
    return _TITLES.get(measure, measure.removeprefix(TASK))


def counted_over(measure: str) -> str:
    """Tell what could have been others beside the seeds."""
    return "questions" if measure.startswith(TASK) else "documents"
