"""What is let in: how much may be in flight, and who of those that wait is next.

Tokens are the unit of a teacher's work and of its memory, so they are what is bounded. Only what the cache does not
answer waits: `AdmittedTeacher` stands between the cache and the engine. What is over a bound is told when to come back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from potstill.cache.errors import DeadlineExceeded, LimitExceeded, PotstillError
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.types import Fields, Targets, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.access.auth import Caller, current_caller
from potstill.teacher_service.access.quotas import QuotaMeter
from potstill.teacher_service.admission.engine_queue import EngineQueue
from potstill.teacher_service.admission.fair_queue import Batch, Call
from potstill.teacher_service.admission.limits import engine_bytes_per_token
from potstill.teacher_service.admission.shared_bound import SharedBound
from potstill.teacher_service.replicas.pool import ReplicaPool
from potstill.teacher_service.settings.service import LimitSettings
from potstill.teacher_service.telemetry.tracing import span

T = TypeVar("T")
BATCH_TOKENS = 2048
"""A call enters the engine in batches of at most so many tokens (or one longer row), so that other keys get their turns
in between; about one step of an engine."""

REFUSAL_REASONS = ("requests", "bodies", "answers", "misses", "queue", "pushed_out", "deadline", "quota")
"""What calls are not let in for, as metrics name it."""

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


class Admission:
    """What of the service's bounds is in use. Used from one event loop only."""

    def __init__(self, limits: LimitSettings) -> None:
        self.limits = limits
        self.refusals: Counter[str] = Counter(dict.fromkeys(REFUSAL_REASONS, 0))
        """By reason."""
        self.queues: dict[str, EngineQueue] = {}
        """In front of each teacher that is up."""
        self.quotas = QuotaMeter()
        self._requests = self._bound(limits.max_requests_in_flight, "score requests", "requests")
        self._bodies = self._bound(limits.max_body_bytes_in_flight, "bytes of request bodies", "bodies")
        self._answers = self._bound(limits.max_answer_bytes_in_flight, "bytes of answers", "answers")
        self._misses = self._bound(limits.max_miss_bytes_in_flight, "bytes of answers to misses", "misses")

    def _bound(self, limit: int, what: str, reason: str) -> SharedBound:
        # A request's place is given back before its rows wait for an engine, so that no engine's speed tells when.
        after = (lambda: None) if reason == "requests" else self._retry_after
        return SharedBound(limit, what, reason=reason, refusals=self.refusals, retry_after=after)

    def _retry_after(self) -> float | None:
        """Bodies and answers are held until their rows are scored: as long as the slowest queue takes."""
        return max((queue.retry_after for queue in self.queues.values()), default=None)

    @property
    def requests_in_flight(self) -> int:
        """Score requests that are read or looked up, until their answer is made or rows begin to wait for an engine."""
        return self._requests.in_use

    @property
    def tokens_in_flight(self) -> int:
        """Inside the engines of all teachers."""
        return sum(queue.tokens_in_flight for queue in self.queues.values())

    @property
    def tokens_waiting(self) -> int:
        """For the engines of all teachers."""
        return sum(queue.tokens_waiting for queue in self.queues.values())

    @property
    def bodies(self) -> SharedBound:
        """Bytes of request bodies."""
        return self._bodies

    @contextmanager
    def request(self) -> Iterator[Reservation]:
        """Hold one score request's slot, from before its body is read until it is answered, or its rows wait.

        The slot is not taken again for the answer: what was scored is never refused, and answers have their own bound.

        Raises:
            Overloaded: `max_requests_in_flight` are there already.
        """
        reservation = Reservation(current_caller().name, self._requests, self._answers, self._misses)
        try:
            yield reservation
        finally:
            reservation.release_slot()

    def answer(self, num_bytes: int) -> AbstractContextManager[None]:
        """Hold the bytes of an answer that is read from the cache.

        Raises:
            Overloaded, LimitExceeded: they are over `max_answer_bytes_in_flight`, with the others or alone.
        """
        return self._answers.hold(current_caller().name, num_bytes)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Take tokens out of the caller's quota.

        Raises:
            Overloaded: not enough is left. LimitExceeded: it can never be.
        """
        try:
            self.quotas.take(caller.name, caller.quota, tokens)
        except PotstillError:
            self.refusals["quota"] += 1
            raise


class Reservation:
    """What one score request holds of the service's bounds: a slot among requests, then its answer's bytes.

    The bytes count among the answers that are read from the cache until `wait`, then among the misses. What is held of
    answers is within `max_answer_bytes_in_flight` and `max_miss_bytes_in_flight` together, each answer as its arrays.
    """

    def __init__(self, key: str, requests: SharedBound, answers: SharedBound, misses: SharedBound) -> None:
        requests.take(key, 1)
        self._key = key
        self._requests: SharedBound | None = requests
        self._answers = answers
        self._misses = misses
        self._num_bytes = 0

    def hold_answer(self, num_bytes: int) -> None:
        """Hold the answer's bytes until `release_answer`.

        Raises:
            Overloaded, LimitExceeded: they are over `max_answer_bytes_in_flight`, with the others or alone.
        """
        self._answers.take(self._key, num_bytes)
        self._num_bytes = num_bytes

    def wait(self) -> None:
        """Make room for hits before rows of the request wait for an engine: give back the slot, count as a miss.

        Raises:
            Overloaded, LimitExceeded: the bytes are over `max_miss_bytes_in_flight`, with the others or alone.
        """
        self.release_slot()
        self._misses.take(self._key, self._num_bytes)
        self._answers.give_back(self._key, self._num_bytes)
        self._answers = self._misses

    def release_slot(self) -> None:
        """Give back the slot among requests. May be repeated."""
        if self._requests is not None:
            self._requests.give_back(self._key, 1)
            self._requests = None

    def release_answer(self) -> None:
        """Give back the answer's bytes, wherever they count by now."""
        self._answers.give_back(self._key, self._num_bytes)
        self._num_bytes = 0


class AdmittedTeacher(WrappedTeacher):
    """A `Teacher` in front of a pool: calls wait their fair turn, in batches. Open with `open`."""

    def __init__(self, pool: ReplicaPool, admission: Admission, queue: EngineQueue) -> None:
        super().__init__(pool)
        self._admission = admission
        self._queue = queue

    @classmethod
    @asynccontextmanager
    async def open(cls, pool: ReplicaPool, admission: Admission, name: str) -> AsyncIterator[AdmittedTeacher]:
        """The teacher's queue is among the admission's as long as this is open."""
        clock = asyncio.get_running_loop().time
        queue = EngineQueue(
            admission.limits, replicas=lambda: pool.status.replicas, refusals=admission.refusals, clock=clock
        )
        admission.queues[name] = queue
        try:
            yield cls(pool, admission, queue)
        finally:
            if admission.queues.get(name) is queue:
                del admission.queues[name]

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """One `Targets` per row, in order; a caller that leaves takes what has not begun out of the queue.

        Raises:
            Overloaded: the queue is full or the caller's quota is spent; `retry_after` says when to come back.
            LimitExceeded: a row that is over `max_engine_bytes`, or rows over a whole day's quota.
            What the pool raises.
        """
        caller = current_caller()
        per_token = engine_bytes_per_token(want, self.identity.vocab_size, self.provenance.capture_path)
        starts = row_starts([len(row) for row in rows])
        call = Call(caller.name, int(starts[-1]))
        for start, stop in row_batches(starts, self._batch_tokens(rows, per_token)):
            size = int(starts[stop] - starts[start])
            call.batches.append(Batch(call, rows[start:stop], size, size * per_token))
        self._admission.spend(caller, call.tokens)
        try:
            with self._queue.entered(call, _deadline.get()):
                return await self._score_batches(call, want)
        finally:
            self._admission.quotas.give_back(caller.name, call.tokens - call.tokens_begun)

    def _batch_tokens(self, rows: Sequence[Tokens], per_token: int) -> int:
        """How long a batch may be, so that each fits into `max_engine_bytes`."""
        most = self._admission.limits.max_engine_bytes // per_token
        longest = max(map(len, rows), default=0)
        if longest > most:
            raise LimitExceeded(
                f"a row of {longest} tokens may need {longest * per_token} bytes in the engine, over "
                f"max_engine_bytes={self._admission.limits.max_engine_bytes}; cut it or ask for less"
            )
        return min(BATCH_TOKENS, most)

    async def _score_batches(self, call: Call, want: Fields) -> list[Targets]:
        tasks = [asyncio.create_task(self._score_batch(batch, want)) for batch in call.batches]
        try:
            return [targets for scored in await asyncio.gather(*tasks) for targets in scored]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _score_batch(self, batch: Batch, want: Fields) -> list[Targets]:
        with span("admission", tokens=batch.tokens):
            await batch.admitted
        scored = False
        try:
            with span("engine", rows=len(batch.rows), tokens=batch.tokens):
                targets = await self.inner.score(batch.rows, want)
            scored = True
        finally:
            self._queue.end(batch, scored=scored)
        return targets


async def within(seconds: float | None, begin: float, scoring: Coroutine[Any, Any, T]) -> T:
    """Await what the caller wants within so many seconds from `begin`, on the event loop's clock; None is no limit.

    Work that would only begin later is refused without waiting.

    Raises:
        DeadlineExceeded: the time is over.
    """
    ends = None if seconds is None else begin + seconds
    told = _deadline.set(ends)
    try:
        async with asyncio.timeout_at(ends) as limit:
            return await scoring
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"not scored within the {seconds:g} seconds that the caller gave") from error
    finally:
        _deadline.reset(told)
