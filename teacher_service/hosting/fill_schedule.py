"""When jobs that fill corpora begin.

A job that was told to come back later may be told so for a day. While it rests another one may begin, up to twice as
many as run at one time, and beyond that the first one of each key: a spent quota of one key keeps no other key's jobs
from beginning. What has begun never waits for others to end: it may hold claims on shards that a job of
another service waits for, and that service may have begun no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class FillSlot:
    """Of one job."""

    key: str = ""
    """Whose it is; empty where there are no keys."""
    given: asyncio.Event = field(default_factory=asyncio.Event)
    began: float | None = None
    """When it was given, on the monotonic clock."""
    asking: int = 0
    """Calls of the teacher under way."""
    pausing: int = 0
    """Calls that were refused, and wait until they ask again."""

    @property
    def rests(self) -> bool:
        """Whether it has begun and none of its calls gets on."""
        return self.pausing > 0 and not self.asking


class FillSchedule:
    """At most `limit` jobs run at one time, but for those that rested; the others wait in the order of asking.

    Used from one event loop only.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun: list[FillSlot] = []
        self._waiting: list[FillSlot] = []

    @property
    def num_begun(self) -> int:
        """Those that run or rest."""
        return len(self._begun)

    def request(self, slot: FillSlot) -> None:
        """Have it given now or later."""
        self._waiting.append(slot)
        self._give()

    def end(self, slot: FillSlot) -> None:
        """Neither have nor want it any more."""
        for slots in (self._begun, self._waiting):
            if slot in slots:
                slots.remove(slot)
        self._give()

    @contextmanager
    def asking(self, slot: FillSlot) -> Iterator[None]:
        """Around one call of the teacher."""
        slot.asking += 1
        try:
            yield
        finally:
            slot.asking -= 1
            self._give()

    async def pause(self, slot: FillSlot, seconds: float) -> None:
        """Wait after a refusal."""
        slot.pausing += 1
        try:
            self._give()
            await asyncio.sleep(seconds)
        finally:
            slot.pausing -= 1

    def _give(self) -> None:
        while sum(not slot.rests for slot in self._begun) < self._limit:
            slot = self._next()
            if slot is None:
                return
            self._waiting.remove(slot)
            self._begun.append(slot)
            slot.began = time.monotonic()
            slot.given.set()

    def _next(self) -> FillSlot | None:
        if len(self._begun) < 2 * self._limit:
            return next(iter(self._waiting), None)
        keys = {slot.key for slot in self._begun}
        return next((slot for slot in self._waiting if slot.key not in keys), None)
