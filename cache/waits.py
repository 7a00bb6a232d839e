"""When a call of a teacher stops being cheap: its rows are known nowhere and wait for an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

_on_wait: ContextVar[Callable[[], None] | None] = ContextVar("on_wait", default=None)


def on_wait(tell: Callable[[], None]) -> None:
    """Have `tell` called by what this task, and those it starts, score; perhaps more than once."""
    _on_wait.set(tell)


def waits() -> None:
    """The current call's rows have to wait from now on."""
    tell = _on_wait.get()
    if tell is not None:
        tell()
