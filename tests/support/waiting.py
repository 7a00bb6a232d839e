"""Waiting for what will be so soon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def eventually(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Look until it is so; TimeoutError if it does not become so."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- what is waited for has no event to tell
            await asyncio.sleep(0.01)


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait outside an event loop until the condition holds; raise AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)
