"""The schedule of jobs that fill corpora: at most so many at one time.

A job whose quota is spent is refused for up to a day. While it rests another one may begin: up to twice the limit of
any key, and beyond that the first job of each further key, so that one key's spent quota blocks no other key. A job
that has begun is never held back again: it may hold claims on shards that a job of another service waits for, and two
services that held back such jobs could wait for each other for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class FillSlot:
    """One job's place in the schedule."""

    key: str = ""
    """Name of the caller's key; empty where there are no keys."""
    given: asyncio.Event = field(default_factory=asyncio.Event)
    began: float | None = None
    """Monotonic time at which the slot was given; None before."""
    asking: int = 0
    """Calls of the teacher under way."""
    pausing: int = 0
    """Calls that were refused and wait before they are tried again."""

    @property
    def rests(self) -> bool:
        """True where all of the job's calls were refused and wait."""
        return self.pausing > 0 and not self.asking


class FillSchedule:
    """Gives slots in the order of asking while fewer than `limit` jobs run. Used from one event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun: list[FillSlot] = []
        self._waiting: list[FillSlot] = []

    @property
    def num_begun(self) -> int:
        """Jobs that run or rest."""
        return len(self._begun)

    def request(self, slot: FillSlot) -> None:
        """Queue a slot; `slot.given` is set now or later."""
        self._waiting.append(slot)
        self._give()

    def end(self, slot: FillSlot) -> None:
        """Give a slot back, or withdraw its request."""
        for slots in (self._begun, self._waiting):
            if slot in slots:
                slots.remove(slot)
        self._give()

    @contextmanager
    def asking(self, slot: FillSlot) -> Iterator[None]:
        """Count one call of the teacher for the length of the block."""
        slot.asking += 1
        try:
            yield
        finally:
            slot.asking -= 1
            self._give()  # the job may rest now, if its other calls all pause

    async def pause(self, slot: FillSlot, seconds: float) -> None:
        """Wait `seconds` after a refusal."""
        slot.pausing += 1
        try:
            self._give()  # this job may rest from now on, which lets another one begin
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
        # Beyond twice the limit each further key gets its first job, whatever the others' quotas.
        keys = {slot.key for slot in self._begun}
        return next((slot for slot in self._waiting if slot.key not in keys), None)
