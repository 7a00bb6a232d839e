"""When a call of a teacher stops being cheap: its rows are known nowhere and wait for an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

_on_wait: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("on_wait", default=())


def on_wait(tell: Callable[[], None]) -> None:
    """Have `tell` called too by what this task, and those it starts, score; perhaps more than once.

    What it raises ends the call before anything of it waits.
    """
    _on_wait.set((*_on_wait.get(), tell))


def forget_waits() -> None:
    """Have nobody called who was given to `on_wait` so far: what begins here is another call."""
    _on_wait.set(())


def waits() -> None:
    """The current call's rows have to wait from now on.

    Raises:
        What was given to `on_wait` does.
    """
    for tell in _on_wait.get():
        tell()
