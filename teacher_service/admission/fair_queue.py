"""A queue that is fair between keys, weighed in tokens.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with equal weights: a key's next work starts, in virtual
time, where its last one ended, or now if the key was idle; the earliest start is served first. A key that sends much
waits behind its own work, one that sends little is served almost at once, and no key saves up for later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from potstill.cache.errors import PotstillError


@dataclass(slots=True, eq=False)
class Turn:
    """A part of a call that is scored at once, and the promise that it may begin."""

    call: Call
    tokens: int
    num_bytes: int
    given: asyncio.Future[None]
    inside: bool = False
    """In the engine now."""


@dataclass(slots=True, eq=False)
class Call:
    """One caller's rows on their way to the engine, in parts; all wait, or some run already."""

    key: str
    tokens: int
    turns: list[Turn] = field(default_factory=list)
    tokens_begun: int = 0
    """Of the parts that had their turn."""


@dataclass(slots=True, eq=False)
class _Line:
    """The turns of one key that wait, oldest first, and where its last served one ended in virtual time."""

    turns: deque[Turn] = field(default_factory=deque)
    tokens: int = 0
    finish: float = 0.0


class FairQueue:
    """The turns that wait. Used from one event loop only."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of all that waits."""
        self._lines: dict[str, _Line] = {}
        self._now = 0.0

    def push(self, call: Call) -> None:
        """Put all of a call's turns behind what its key has waiting."""
        line = self._lines.setdefault(call.key, _Line())
        line.turns.extend(call.turns)
        line.tokens += call.tokens
        self.tokens += call.tokens

    def head(self) -> Turn | None:
        """The turn that is next, or None."""
        line = self._next_line()
        return None if line is None else line.turns[0]

    def pop(self) -> Turn:
        """Take the head out, and charge its key for it."""
        line = self._next_line()
        assert line is not None, "head() said that there is one"
        turn = line.turns.popleft()
        self._now = max(self._now, line.finish)
        line.finish = self._now + turn.tokens
        line.tokens -= turn.tokens
        self.tokens -= turn.tokens
        self._forget_idle()
        return turn

    def drop(self, call: Call, error: PotstillError | None = None) -> int:
        """Take out what still waits of a call; returns its tokens, which nobody is charged for.

        With an `error` those who wait for a turn get it, else their waits are cancelled.
        """
        line = self._lines.get(call.key)
        mine = [] if line is None else [turn for turn in line.turns if turn.call is call]
        if line is None or not mine:
            return 0
        line.turns = deque(turn for turn in line.turns if turn.call is not call)
        dropped = sum(turn.tokens for turn in mine)
        line.tokens -= dropped
        self.tokens -= dropped
        self._forget_idle()
        for turn in mine:
            if error is None:
                turn.given.cancel()
            elif not turn.given.done():
                turn.given.set_exception(error)
        return dropped

    def tokens_of(self, key: str) -> int:
        """How much a key has waiting."""
        return self._lines[key].tokens if key in self._lines else 0

    def tokens_ahead(self, key: str, tokens: int) -> int:
        """What is served before the last of `tokens` more of a key: its own, and as much of every other."""
        own = self.tokens_of(key) + tokens
        others = (line.tokens for name, line in self._lines.items() if name != key)
        return own - tokens + sum(min(other, own) for other in others)

    def heaviest_key(self) -> str | None:
        """The key with the most waiting."""
        return max(self._lines, key=self.tokens_of, default=None)

    def newest_unstarted(self, key: str) -> list[Call]:
        """A key's calls of which nothing began, the newest first."""
        turns = self._lines[key].turns if key in self._lines else ()
        return list(dict.fromkeys(turn.call for turn in reversed(turns) if not turn.call.tokens_begun))

    def _next_line(self) -> _Line | None:
        waiting = (line for line in self._lines.values() if line.turns)
        # Of equal starts the first in the dict: the key that came first.
        return min(waiting, key=lambda line: max(line.finish, self._now), default=None)

    def _forget_idle(self) -> None:
        # Virtual time is past what an idle key was charged: it would start now, like a new one.
        idle = [key for key, line in self._lines.items() if not line.turns and line.finish <= self._now]
        for key in idle:
            del self._lines[key]
        if not self.tokens:
            self._lines.clear()  # nobody competes: what came before gives nobody an advantage
            self._now = 0.0
