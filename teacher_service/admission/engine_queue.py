"""The queue in front of one teacher's engine: bounded in tokens, fair between keys, never over the engine's memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from potstill.cache.errors import Overloaded
from potstill.teacher_service.admission.fair_queue import Batch, Call, FairQueue
from potstill.teacher_service.settings import LimitSettings

_SHORTEST_RETRY_SECONDS = 1.0
# The rate is measured over half a minute, and the queue may empty sooner: nobody is sent away for longer than this.
_LONGEST_RETRY_SECONDS = 60.0
_MEMORY_SECONDS = 30.0
"""Time constant of the measured throughput: older work counts by exp(-age / this)."""


@dataclass(eq=False)
class EngineQueue:
    """Calls that wait for one engine, and batches that are inside it. Used from one event loop only.

    At most `max_tokens_in_flight` tokens wait or are inside. Inside are at most `max_engine_tokens` per replica and
    `max_engine_bytes` in all, but a single larger batch goes in alone.
    """

    limits: LimitSettings
    replicas: Callable[[], int]
    """Function that tells how many engines work right now."""
    refusals: Counter[str]
    """Counts by reason: `queue` (full), `pushed_out` (for a key with less waiting), `deadline`."""
    clock: Callable[[], float]
    """The event loop's."""
    tokens_in_flight: int = 0
    """Tokens inside the engine."""
    bytes_in_flight: int = 0
    """Bytes that those tokens may need, by `engine_bytes_per_token`."""
    _waiting: FairQueue = field(default_factory=FairQueue)

    def __post_init__(self) -> None:
        self._throughput = Throughput(self.clock)

    @property
    def tokens_waiting(self) -> int:
        """Tokens that are not inside the engine yet."""
        return self._waiting.tokens

    @property
    def tokens_per_second(self) -> float:
        """Recent speed while there was work; 0 before anything was scored."""
        return self._throughput.tokens_per_second

    @property
    def retry_after(self) -> float:
        """Seconds until what waits now is scored, at the measured rate; 1 to 60."""
        rate = self.tokens_per_second
        seconds = self.tokens_waiting / rate if rate else 0.0
        return min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)

    @contextmanager
    def entered(self, call: Call, deadline: float | None) -> Iterator[None]:
        """Put a call's batches into the queue, and take out what is left of them at the end of the block.

        Args:
            call: each of its batches goes into the engine as a whole; await `Batch.admitted` before scoring it.
            deadline: on the queue's clock; None for none.

        Raises:
            Overloaded: the queue is full, or the call could not begin before the deadline. `retry_after` is set.
                `Batch.admitted` raises it too: a call that has not begun may be pushed out for a key with less waiting.
        """
        self._check_deadline(call, deadline)
        self._make_room(call)
        self._waiting.push(call)
        self._pump()
        try:
            yield
        finally:
            self._waiting.drop(call)
            # A call may be cancelled between a batch's admission and its scoring, when nobody else ends the batch.
            for batch in call.batches:
                self.end(batch, scored=False)
            self._pump()

    def end(self, batch: Batch, *, scored: bool) -> None:
        """Take a batch out of the engine's count, unless it was never inside or has left already."""
        if not batch.inside:
            return
        batch.inside = False
        self.tokens_in_flight -= batch.tokens
        self.bytes_in_flight -= batch.num_bytes
        # A failed batch has kept the engine busy, too: its time counts, and its tokens do not.
        self._throughput.finish(batch.tokens if scored else 0)
        self._pump()

    def _pump(self) -> None:
        """Admit batches as long as the next one fits. Nothing overtakes it, or a large one would wait for ever."""
        while (batch := self._waiting.head()) is not None:
            if batch.admitted.cancelled():
                self._waiting.drop(batch.call)  # its caller left just now, and is about to leave the queue
            elif self._fits(batch):
                self._begin(self._waiting.pop())
            else:
                return

    def _fits(self, batch: Batch) -> bool:
        if not self.tokens_in_flight:
            return True  # a batch over the bounds would never go in otherwise
        return (
            self.tokens_in_flight + batch.tokens <= self._engine_tokens
            and self.bytes_in_flight + batch.num_bytes <= self.limits.max_engine_bytes
        )

    @property
    def _engine_tokens(self) -> int:
        return self.limits.max_engine_tokens * max(1, self.replicas())

    def _begin(self, batch: Batch) -> None:
        if not self.tokens_in_flight:
            self._throughput.begin()
        batch.inside = True
        batch.call.tokens_begun += batch.tokens
        self.tokens_in_flight += batch.tokens
        self.bytes_in_flight += batch.num_bytes
        batch.admitted.set_result(None)

    def _check_deadline(self, call: Call, deadline: float | None) -> None:
        rate = self.tokens_per_second
        if deadline is None or not rate or not call.batches:
            return  # without a measured rate nobody is refused on a guess
        first = call.batches[0].tokens
        ahead = self._waiting.tokens_ahead(call.key, first) + self.tokens_in_flight
        # So many tokens have to be scored before the first batch fits into the engine.
        wait = max(0, ahead + first - self._engine_tokens) / rate
        left = deadline - self.clock()
        if wait > left:
            self.refusals["deadline"] += 1
            raise Overloaded(
                f"{ahead} tokens are ahead at {rate:.0f} tokens/s: this could not begin within the {max(left, 0):.1f} "
                "seconds that are left to its caller; retry later, or wait longer",
                retry_after=self.retry_after,
            )

    def _make_room(self, call: Call) -> None:
        """Refuse a call that is over `max_tokens_in_flight`, unless a key with more waiting gives way."""
        bound = self.limits.max_tokens_in_flight
        missing = self.tokens_waiting + self.tokens_in_flight + call.tokens - bound
        if missing <= 0:
            return
        for other in self._giving_way(call, missing):
            self.refusals["pushed_out"] += 1
            self._waiting.drop(other, self._full(other, "the key with the most waiting gives way"))
            missing -= other.tokens
        if missing > 0:
            self.refusals["queue"] += 1
            raise self._full(call, f"{self.tokens_waiting} wait and {self.tokens_in_flight} are in the engine")

    def _giving_way(self, call: Call, missing: int) -> list[Call]:
        """The newest calls of the heaviest key that free `missing` tokens; none where that is not enough.

        A call never pushes out a key that would have less waiting than its own.
        """
        heaviest = self._waiting.heaviest_key()
        own = self._waiting.tokens_of(call.key) + call.tokens
        if heaviest is None or heaviest == call.key or self._waiting.tokens_of(heaviest) <= own:
            return []
        chosen: list[Call] = []
        for other in self._waiting.newest_unstarted(heaviest):
            chosen.append(other)
            missing -= other.tokens
            if missing <= 0:
                return chosen
        return []

    def _full(self, call: Call, why: str) -> Overloaded:
        bound = self.limits.max_tokens_in_flight
        return Overloaded(
            f"{call.tokens} tokens are over what max_tokens_in_flight={bound} leaves: {why}; retry later",
            retry_after=self.retry_after,
        )


class Throughput:
    """The speed of an engine: scored tokens per busy second, both forgotten at the same exponential rate.

    Completions arrive in bursts; the ratio of the two sums does not depend on when between two bursts it is read.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0
        self._counted_to = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed while there is work; 0 as long as nothing was scored."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def begin(self) -> None:
        """Note that work begins after an idle time, which does not count."""
        self._counted_to = self._clock()

    def finish(self, tokens: int) -> None:
        """Count tokens that were scored; after an idle time call `begin` before."""
        now = self._clock()
        busy = now - self._counted_to
        keep = math.exp(-busy / _MEMORY_SECONDS)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + busy
        self._counted_to = now
