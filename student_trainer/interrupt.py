"""Ctrl-C and SIGTERM as a wish to stop: the run writes a checkpoint first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class StopRequest:
    """Whether somebody asked to stop."""

    signal_number: int = 0
    """Of the first signal; 0 before."""

    def __call__(self) -> bool:
        """True once asked."""
        return self.signal_number != 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM sets the request; a second one interrupts at once.

    For the main thread only, like all signal handlers.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if request():
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
