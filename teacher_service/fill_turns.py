"""Turns of the jobs that fill corpora: a job asks its teacher only while it has one.

A job that is told to come back later may be told so for a day. While none of its calls gets on it gives its turn back,
and waits for another one behind the jobs that wait already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class FillTurn:
    """Of one job."""

    given: asyncio.Event = field(default_factory=asyncio.Event)
    began: float | None = None
    """When it was given first, on the monotonic clock."""
    asking: int = 0
    """Calls of the teacher under way."""
    pausing: int = 0
    """Calls that were refused, and wait until they ask again."""


class FillTurns:
    """At most `limit` have the turn at one time, the others in the order in which they want it.

    Used from one event loop only.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._given: list[FillTurn] = []
        self._wanted: list[FillTurn] = []

    def want(self, turn: FillTurn) -> None:
        """Have it given now or later; nothing happens when it is given, or wanted, already."""
        if turn not in self._given and turn not in self._wanted:
            self._wanted.append(turn)
            self._give()

    def give_back(self, turn: FillTurn) -> None:
        """Neither have nor want it any more."""
        for turns in (self._given, self._wanted):
            if turn in turns:
                turns.remove(turn)
        turn.given.clear()
        self._give()

    @asynccontextmanager
    async def asking(self, turn: FillTurn) -> AsyncIterator[None]:
        """Around one call of the teacher, which waits for the turn."""
        while not turn.given.is_set():  # it may have been given back again before this call woke up
            self.want(turn)
            await turn.given.wait()
        turn.asking += 1
        try:
            yield
        finally:
            turn.asking -= 1
            self._rest(turn)

    async def pause(self, turn: FillTurn, seconds: float) -> None:
        """Wait after a refusal."""
        turn.pausing += 1
        try:
            self._rest(turn)
            await asyncio.sleep(seconds)
        finally:
            turn.pausing -= 1

    def _rest(self, turn: FillTurn) -> None:
        if turn.pausing and not turn.asking:
            self.give_back(turn)

    def _give(self) -> None:
        while self._wanted and len(self._given) < self._limit:
            turn = self._wanted.pop(0)
            self._given.append(turn)
            turn.began = turn.began or time.monotonic()
            turn.given.set()
