"""The listing of all corpora, as JSON that many callers share."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from potstill.teacher_service.transport.turns import FairThreads

_TIMES_AS_LONG = 20


class Listing:
    """Makes the listing again once twenty times as long as it took has passed: at most 5% of one thread's time.

    A corpus that comes or goes is seen that much later: of a few corpora at once, of hundreds after half a minute.
    Used from one event loop only.
    """

    def __init__(self, threads: FairThreads, make: Callable[[], dict[str, Any]]) -> None:
        self._threads = threads
        self._make = make
        self._making: asyncio.Task[bytes] | None = None
        self._until = 0.0

    async def latest(self) -> bytes:
        """The listing, made anew where it is due; all that ask meanwhile wait for the same one.

        Raises:
            StoreError: the store does not list the corpora.
        """
        making = self._making
        if making is None or (making.done() and time.monotonic() >= self._until):
            making = self._making = asyncio.create_task(self._make_it(), name="corpora")
        # Not awaited itself: a caller that leaves must not cancel it for the others.
        await asyncio.wait({making})
        return making.result()

    async def _make_it(self) -> bytes:
        self._until = 0.0  # after a failure at once
        begin = time.monotonic()
        made = json.dumps(await self._threads.run(self._make), separators=(",", ":")).encode()
        end = time.monotonic()
        self._until = end + _TIMES_AS_LONG * (end - begin)
        return made
