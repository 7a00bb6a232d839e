"""Admission of score requests: the bounds of all together, and the wait for a teacher's engine.

Tokens are the unit of a teacher's work and of its memory, so tokens are bounded. `AdmittedTeacher` stands between the
cache and the engine, so that only rows that the cache misses wait. A call over a bound is told when to come back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from potstill.cache.errors import DeadlineExceeded, LimitExceeded, PotstillError
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.types import Fields, Targets, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.access import Caller, QuotaMeter
from potstill.teacher_service.access.auth import current_caller
from potstill.teacher_service.admission.engine_queue import EngineQueue
from potstill.teacher_service.admission.fair_queue import Batch, Call
from potstill.teacher_service.admission.limits import engine_bytes_per_token
from potstill.teacher_service.admission.shared_bound import SharedBound
from potstill.teacher_service.replicas import ReplicaPool
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.telemetry import span

T = TypeVar("T")
BATCH_TOKENS = 2048
"""Most tokens of one batch, or one longer row. A call enters the engine batch by batch, so that other keys get their
turns in between; this is about one step of an engine."""

_SMALL_BYTES = 64 * 2**10  # parsed at once, on the event loop: less than a millisecond

REFUSAL_REASONS = ("requests", "bodies", "answers", "misses", "queue", "pushed_out", "deadline", "quota")
"""Reasons for which calls are refused, as metrics name them."""

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


class Admission:
    """Counts what is in use of the service's bounds. Used from one event loop only."""

    def __init__(self, limits: LimitSettings) -> None:
        self.limits = limits
        self.refusals: Counter[str] = Counter(dict.fromkeys(REFUSAL_REASONS, 0))
        """Refused calls, by reason."""
        self.queues: dict[str, EngineQueue] = {}
        """The queue in front of each teacher that is up, by the teacher's name."""
        self.quotas = QuotaMeter()
        self._requests = self._bound(limits.max_requests_in_flight, "score requests", "requests")
        self.bodies = self._bound(limits.max_body_bytes_in_flight, "bytes of request bodies", "bodies")
        """The bound of request bodies, in bytes."""
        self._answers = self._bound(limits.max_answer_bytes_in_flight, "bytes of answers", "answers")
        self._misses = self._bound(limits.max_miss_bytes_in_flight, "bytes of answers to misses", "misses")
        # One: JSON is parsed under the interpreter's lock anyway, so more would only hold more half-made values.
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse-body")

    def _bound(self, limit: int, what: str, reason: str) -> SharedBound:
        # A request's slot is given back before its rows wait for an engine, so no engine's speed says when it is free.
        after = (lambda: None) if reason == "requests" else self._retry_after
        return SharedBound(limit, what, reason=reason, refusals=self.refusals, retry_after=after)

    def _retry_after(self) -> float | None:
        """Seconds that the slowest queue takes: bodies and answers are held until their rows are scored."""
        return max((queue.retry_after for queue in self.queues.values()), default=None)

    @property
    def requests_in_flight(self) -> int:
        """Score requests that are read or looked up, until their answer is made or rows begin to wait for an engine."""
        return self._requests.in_use

    @property
    def tokens_in_flight(self) -> int:
        """Tokens inside the engines of all teachers."""
        return sum(queue.tokens_in_flight for queue in self.queues.values())

    @property
    def tokens_waiting(self) -> int:
        """Tokens that wait for the engines of all teachers."""
        return sum(queue.tokens_waiting for queue in self.queues.values())

    @contextmanager
    def request(self) -> Iterator[Reservation]:
        """Hold one score request's slot, from before its body is read until it is answered, or its rows wait.

        The slot is not taken again for the answer: scored rows are never refused, and answers have their own bound.

        Raises:
            Overloaded: `max_requests_in_flight` are being served already.
        """
        reservation = Reservation(current_caller().name, self._requests, self._answers, self._misses)
        try:
            yield reservation
        finally:
            reservation.release_slot()

    async def parse(self, understand: Callable[[bytes], T], body: bytes) -> T:
        """Call `understand` with a body: a long one in a thread, one after the other; raises what it raises."""
        if len(body) < _SMALL_BYTES:
            return understand(body)
        return await asyncio.get_running_loop().run_in_executor(self._parser, understand, body)

    def answer(self, num_bytes: int) -> AbstractContextManager[None]:
        """Hold the bytes of an answer that is read from the cache.

        Raises:
            Overloaded, LimitExceeded: they are over `max_answer_bytes_in_flight`, with the others or alone.
        """
        return self._answers.hold(current_caller().name, num_bytes)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Charge tokens to the caller's quota.

        Raises:
            Overloaded: not enough is left. LimitExceeded: more than a whole day's quota.
        """
        try:
            self.quotas.take(caller.name, caller.quota, tokens)
        except PotstillError:
            self.refusals["quota"] += 1
            raise


class Reservation:
    """One score request's share of the service's bounds: a slot among requests, and its answer's bytes.

    Until `wait` the bytes count against `max_answer_bytes_in_flight`, like answers from the cache; after it against
    `max_miss_bytes_in_flight`. An answer counts with the size of its arrays.
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
        """Give back the slot and count as a miss, so that hits find room while this request waits for an engine.

        Raises:
            Overloaded, LimitExceeded: the bytes are over `max_miss_bytes_in_flight`, with the others or alone.
        """
        self.release_slot()
        # Taken first: where it is refused, `release_answer` still gives back what is counted among the answers.
        self._misses.take(self._key, self._num_bytes)
        self._answers.give_back(self._key, self._num_bytes)
        self._answers = self._misses

    def release_slot(self) -> None:
        """Give back the slot among requests. May be repeated."""
        if self._requests is not None:
            self._requests.give_back(self._key, 1)
            self._requests = None

    def release_answer(self) -> None:
        """Give back the answer's bytes, to whichever bound they count against by now."""
        self._answers.give_back(self._key, self._num_bytes)
        self._num_bytes = 0


class AdmittedTeacher(WrappedTeacher):
    """A `Teacher` in front of a pool: each call waits for its fair turn, batch by batch. Open with `open`."""

    def __init__(self, pool: ReplicaPool, admission: Admission, queue: EngineQueue) -> None:
        super().__init__(pool)
        self._admission = admission
        self._queue = queue

    @classmethod
    @asynccontextmanager
    async def open(cls, pool: ReplicaPool, admission: Admission, name: str) -> AsyncIterator[AdmittedTeacher]:
        """Put a queue in front of the pool, among the admission's as long as this is open."""
        clock = asyncio.get_running_loop().time
        queue = EngineQueue(
            admission.limits, replicas=lambda: pool.status.replicas, refusals=admission.refusals, clock=clock
        )
        admission.queues[name] = queue
        try:
            yield cls(pool, admission, queue)
        finally:
            # Another teacher of that name may have been added while this one closed.
            if admission.queues.get(name) is queue:
                del admission.queues[name]

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows: one `Targets` per row, in order. A cancelled call takes what has not begun out of the queue.

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
        # Before the queue: a call without quota must not push another key's calls out of it.
        self._admission.spend(caller, call.tokens)
        try:
            with self._queue.entered(call, _deadline.get()):
                return await self._score_batches(call, want)
        finally:
            # Batches that have begun stay charged even when the call failed: the engine has worked on them.
            self._admission.quotas.give_back(caller.name, call.tokens - call.tokens_begun)

    def _batch_tokens(self, rows: Sequence[Tokens], per_token: int) -> int:
        """Most tokens of one batch, so that each fits into `max_engine_bytes`."""
        most = self._admission.limits.max_engine_bytes // per_token
        longest = max(map(len, rows), default=0)
        if longest > most:
            raise LimitExceeded(
                f"a row of {longest} tokens may need {longest * per_token} bytes in the engine, over "
                f"max_engine_bytes={self._admission.limits.max_engine_bytes}; cut it or ask for less"
            )
        return min(BATCH_TOKENS, most)

    async def _score_batches(self, call: Call, want: Fields) -> list[Targets]:
        # A task for each, as batches are admitted one by one and then run in the engine side by side.
        tasks = [asyncio.create_task(self._score_batch(batch, want)) for batch in call.batches]
        try:
            return [targets for scored in await asyncio.gather(*tasks) for targets in scored]
        finally:
            # Where one batch failed the others are of no use. They are awaited, so that none is left in the engine.
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
    """Await `scoring` until `seconds` after `begin`, on the event loop's clock; None is no limit.

    Queues see the deadline, and refuse at once what could not begin before it.

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
            raise  # a timeout of something inside, which is not the caller's deadline
        raise DeadlineExceeded(f"not scored within the {seconds:g} seconds that the caller gave") from error
    finally:
        _deadline.reset(told)
