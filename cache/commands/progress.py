"""Progress of long work: a bar on a terminal, and elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Between lines where there is no terminal, as in the log of a job that runs for days.
_LINE_SECONDS = 10.0


class Show(Protocol):
    """Function that shows the progress of a piece of work."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` units (None when not known) are done, with a short note beside."""


@contextmanager
def progress(title: str, unit: str) -> Iterator[Show]:
    """Show progress until the block ends, with units a second and the time left."""
    # On stderr, so that a command's output can be piped.
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with _bar(console, title, unit) as show:
            yield show
    else:
        yield _lines(title, unit)


@contextmanager
def _bar(console: Console, title: str, unit: str) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        _Rate(unit),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as bars:
        task = bars.add_task(title, total=1, note="")

        def show(done: int, total: int | None, note: str = "") -> None:
            bars.update(task, completed=done, total=total or done or 1, note=note)

        yield show


def _lines(title: str, unit: str) -> Show:
    began = shown = time.monotonic()
    last = (-1, "")

    def show(done: int, total: int | None, note: str = "") -> None:
        nonlocal shown, last
        now = time.monotonic()
        # The end is told at once, and once: when all is scored there may be much left to write.
        if now - shown < _LINE_SECONDS and (done != total or (done, note) == last):
            return
        shown, last = now, (done, note)
        rate = done / max(now - began, 1e-9)
        of = left = ""
        if total:
            of = f"/{total:,}"
            left = f", {(total - done) / rate:,.0f} s left" if rate else ""
        told = f", {note}" if note else ""
        sys.stderr.write(f"{title}: {done:,}{of} {unit}, {rate:,.0f} {unit}/s{told}{left}\n")
        sys.stderr.flush()

    return show


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else "")
