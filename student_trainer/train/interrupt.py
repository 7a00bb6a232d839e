"""Ctrl-C and SIGTERM as a request to stop, after which a run writes a checkpoint and returns."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class StopRequest:
    """A flag that is called to read it: true once somebody asked to stop."""

    signal_number: int = 0
    """Number of the first signal; 0 before it."""

    def __call__(self) -> bool:
        """True once somebody asked to stop."""
        return self.signal_number != 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM within the block into a request to stop; a second one interrupts at once.

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
