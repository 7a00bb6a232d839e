"""Progress of a run for a person: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.student_trainer.metrics.records import Record

_LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


def begun(step: int, where: str) -> str:
    """The first line of a run that goes on from a step, or begins, which is -1."""
    return f"{f'resuming from step {step}' if step >= 0 else 'training'} {where}"


@contextmanager
def showing(total_steps: int, console: Console) -> Iterator[Callable[[Record], None]]:
    """Give a function that shows a record of `metrics.jsonl`, for use until the block ends."""
    if not console.is_terminal:
        yield _lines(total_steps, console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=total_steps, text="starting")
        held_out = ""

        def show(record: Record) -> None:
            nonlocal held_out
            if "rollback" in record:
                progress.console.print(rollback_text(record), highlight=False, soft_wrap=True)
                return
            if "loss" not in record:
                held_out = f"  held-out {nats(record['held_out']['ce'], 3)}" if "held_out" in record else ""
                held_out += gap_text(record)
                return
            text = f"loss {record['loss']:.3f}{held_out}  {speed_text(record)}"
            progress.update(task, completed=record["step"], text=text)

        yield show


def _lines(total_steps: int, console: Console) -> Callable[[Record], None]:
    next_line = 0.0

    def show(record: Record) -> None:
        nonlocal next_line
        text = f"step {record['step']}/{total_steps}"
        if "rollback" in record:
            text = rollback_text(record)
        elif "loss" not in record:
            text += evaluations_text(record) + gap_text(record)
        elif time.monotonic() < next_line and record["step"] != total_steps:
            return
        else:
            next_line = time.monotonic() + _LINE_SECONDS
            left = (total_steps - record["step"]) * record["seconds"] / max(record["step"], 1)
            text += f"  loss {record['loss']:.4f}  {speed_text(record)}  {left:,.0f} s left"
        console.print(text, highlight=False, soft_wrap=True)

    return show


def rollback_text(record: Record) -> str:
    """Put a rollback into words."""
    told = record["rollback"]
    return (
        f"back to step {record['step']} from step {told['from_step']}, where {told['why']}; its "
        f"{counted(told['skipped_rows'], 'row')} are left out"
    )


def speed_text(record: Record) -> str:
    """Put a step's speed into words: `3,100 tokens/s, 41% MFU, 0.3% waiting, 1.2 GiB`."""
    mfu = f", {record['mfu']:.0%} MFU" if "mfu" in record else ""
    told = f"{record['tokens_per_second']:,.0f} tokens/s{mfu}, {record['waiting_share']:.1%} waiting"
    return f"{told}, {record['peak_memory_bytes'] / 2**30:.1f} GiB"


def nats(value: float | None, digits: int = 4) -> str:
    """Write a loss with so many digits; `-` where there is none, as no token has a label."""
    return "-" if value is None else f"{value:.{digits}f}"


def evaluations_text(record: Record) -> str:
    """Put a record's evaluations into words, each behind two spaces and its name."""
    found = {"held-out": record["held_out"]} if record.get("held_out") else {}
    return "".join(f"  {name} {held_out_text(one)}" for name, one in (found | record.get("evaluations", {})).items())


def gap_text(record: Record) -> str:
    """Put into words how much higher the loss is on held-out rows than it was on training rows, if that is known."""
    return f" (gap to training {record['gap']:+.3f})" if "gap" in record else ""


def held_out_text(held_out: Record) -> str:
    """Put an evaluation's JSON into words: `ce 5.9120; big: kl 0.9130, same top-1 41%`."""
    parts = [f"ce {nats(held_out['ce'])}"]
    parts += [
        f"{name}: kl {found['kl']:.4f}, same top-1 {found['top1_agreement']:.0%}"
        for name, found in held_out["teachers"].items()
    ]
    return "; ".join(parts)
