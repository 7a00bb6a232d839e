"""Shows a run to a person: a live bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from potstill.student_trainer.metrics import Record

_LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


@contextmanager
def showing(total_steps: int, console: Console) -> Iterator[Callable[[Record], None]]:
    """A function that takes every record of `metrics.jsonl` and shows it, until the block ends."""
    if console.is_terminal:
        with _bar(console) as progress:
            yield _Bar(progress, progress.add_task("train", total=total_steps, text="starting")).show
    else:
        yield _Lines(total_steps, console).show


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._held_out = ""

    def show(self, record: Record) -> None:
        if "held_out" in record:
            self._held_out = f"  held-out {record['held_out']['ce']:.3f}"
            return
        text = f"loss {record['loss']:.3f}{self._held_out}  {record['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=record["step"], text=text)


class _Lines:
    def __init__(self, total_steps: int, console: Console) -> None:
        self._total = total_steps
        self._console = console
        self._next = 0.0

    def show(self, record: Record) -> None:
        step = f"step {record['step']}/{self._total}"
        if "held_out" in record:
            self._line(f"{step}  held-out {held_out_text(record['held_out'])}")
        elif time.monotonic() >= self._next or record["step"] == self._total:
            self._next = time.monotonic() + _LINE_SECONDS
            left = (self._total - record["step"]) * record["seconds"] / max(record["step"], 1)
            self._line(
                f"{step}  loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
            )

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def held_out_text(held_out: Record) -> str:
    """`ce 5.912, big: kl 0.913, same top-1 41%` of an evaluation's JSON."""
    parts = [f"ce {held_out['ce']:.4f}"]
    parts += [
        f"{name}: kl {found['kl']:.4f}, same top-1 {found['top1_agreement']:.0%}"
        for name, found in held_out["teachers"].items()
    ]
    return "; ".join(parts)


def _bar(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    return Progress(*columns, console=console)
