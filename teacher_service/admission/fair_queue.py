"""A queue that is fair between keys, weighed in tokens.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with equal weights: a key's next work starts, in virtual
time, where its last one ended, or now if the key was idle; the earliest start is served first. A key that sends much
waits behind its own work, one that sends little is served almost at once, and no key saves up for later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from potstill.cache.errors import PotstillError
from potstill.cache.types import Tokens


@dataclass(slots=True, eq=False)
class Batch:
    """Rows of a call that are scored at once, and the future that tells that they may begin."""

    call: Call
    rows: Sequence[Tokens]
    tokens: int
    num_bytes: int
    """Bytes that they may need in the engine."""
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    inside: bool = False
    """True while the batch is in the engine."""


@dataclass(slots=True, eq=False)
class Call:
    """One caller's rows on their way to the engine, in batches of which some may run already."""

    key: str
    tokens: int
    batches: list[Batch] = field(default_factory=list)
    tokens_begun: int = 0
    """Tokens of the batches that were admitted."""


@dataclass(slots=True, eq=False)
class _KeyQueue:
    """The batches of one key that wait, oldest first, and where its last served one ended in virtual time."""

    batches: deque[Batch] = field(default_factory=deque)
    tokens: int = 0
    finish: float = 0.0


class FairQueue:
    """The batches that wait. Used from one event loop only."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that wait, of all keys."""
        self._queues: dict[str, _KeyQueue] = {}
        self._now = 0.0

    def push(self, call: Call) -> None:
        """Put all of a call's batches behind what its key has waiting."""
        queue = self._queues.setdefault(call.key, _KeyQueue())
        queue.batches.extend(call.batches)
        queue.tokens += call.tokens
        self.tokens += call.tokens

    def head(self) -> Batch | None:
        """The next batch, left in the queue; None where nothing waits."""
        queue = self._next_queue()
        return None if queue is None else queue.batches[0]

    def pop(self) -> Batch:
        """Take the next batch out, and charge its key for it in virtual time."""
        queue = self._next_queue()
        assert queue is not None, "head() said that there is one"
        batch = queue.batches.popleft()
        self._now = max(self._now, queue.finish)
        queue.finish = self._now + batch.tokens
        queue.tokens -= batch.tokens
        self.tokens -= batch.tokens
        self._forget_idle()
        return batch

    def drop(self, call: Call, error: PotstillError | None = None) -> None:
        """Take out what still waits of a call; no key is charged for it.

        Awaiting `Batch.admitted` then raises `error`, or is cancelled without one.
        """
        queue = self._queues.get(call.key)
        mine = [] if queue is None else [batch for batch in queue.batches if batch.call is call]
        if queue is None or not mine:
            return
        queue.batches = deque(batch for batch in queue.batches if batch.call is not call)
        dropped = sum(batch.tokens for batch in mine)
        queue.tokens -= dropped
        self.tokens -= dropped
        self._forget_idle()
        for batch in mine:
            if error is None:
                batch.admitted.cancel()
            elif not batch.admitted.done():
                batch.admitted.set_exception(error)

    def tokens_of(self, key: str) -> int:
        """Tokens that a key has waiting."""
        return self._queues[key].tokens if key in self._queues else 0

    def tokens_ahead(self, key: str, tokens: int) -> int:
        """Tokens served before the last of `tokens` more of a key: those it has, and as many of every other key."""
        own = self.tokens_of(key) + tokens
        others = (queue.tokens for name, queue in self._queues.items() if name != key)
        return own - tokens + sum(min(other, own) for other in others)

    def heaviest_key(self) -> str | None:
        """The key with the most waiting."""
        return max(self._queues, key=self.tokens_of, default=None)

    def newest_unstarted(self, key: str) -> list[Call]:
        """Calls of a key of which no batch was admitted, the newest first."""
        batches = self._queues[key].batches if key in self._queues else ()
        return list(dict.fromkeys(batch.call for batch in reversed(batches) if not batch.call.tokens_begun))

    def _next_queue(self) -> _KeyQueue | None:
        waiting = (queue for queue in self._queues.values() if queue.batches)
        # Of equal starts the first in the dict: the key that came first.
        return min(waiting, key=lambda queue: max(queue.finish, self._now), default=None)

    def _forget_idle(self) -> None:
        # Virtual time is past what an idle key was charged: it would start now, like a new one.
        idle = [key for key, queue in self._queues.items() if not queue.batches and queue.finish <= self._now]
        for key in idle:
            del self._queues[key]
        if not self.tokens:
            self._queues.clear()  # nobody competes: what came before gives nobody an advantage
            self._now = 0.0
