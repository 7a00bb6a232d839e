"""A teacher as the service holds it: its life from start to stop, the pool of replicas and the cache in front."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from potstill.cache.errors import PotstillError, TeacherFailed, Unavailable
from potstill.cache.types import Fields, Targets, Teacher, TeacherIdentity, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.admission import Admission, AdmittedTeacher
from potstill.teacher_service.replicas import LocalPool, OpenTeacher, ReplicaPool
from potstill.teacher_service.settings import TeacherSettings

if TYPE_CHECKING:
    from potstill.cache.cache import Cache
    from potstill.cache.read_through import CachedTeacher, KeepPolicy

_LOG = logging.getLogger(__name__)
_NO_ENGINE_SECONDS = 60.0  # an engine that restarts for longer is likely not to come back, so a removal goes on
_LOOK_SECONDS = 1.0
State: TypeAlias = Literal["starting", "ready", "draining", "stopped", "failed"]
OpenPool: TypeAlias = Callable[[OpenTeacher], AbstractAsyncContextManager[ReplicaPool]]


@dataclass(frozen=True, slots=True)
class Keep:
    """The cache that keeps a teacher's answers, and how it keeps them."""

    cache: Cache
    policy: KeepPolicy


class _InFlight:
    """Counts the calls in flight, and wakes who waits for none."""

    def __init__(self) -> None:
        self._calls = 0
        self.none = asyncio.Event()
        self.none.set()

    @contextmanager
    def call(self) -> Iterator[None]:
        self._calls += 1
        self.none.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self.none.set()


@dataclass(eq=False)
class HostedTeacher:
    """A named teacher that starts in the background and can be called once its engine is up.

    One task opens everything, waits for the stop and closes everything in reverse order, so every
    resource is closed by the task that opened it.
    """

    name: str
    """The name that requests use."""
    open_teacher: OpenTeacher
    """Function that opens one engine."""
    keep: Keep | None = None
    """The cache that keeps the answers; None keeps none."""
    _: KW_ONLY
    open_pool: OpenPool = LocalPool.open
    """Function that opens the replicas that `open_teacher` makes; by default one in this process."""
    settings: TeacherSettings | None = None
    """The settings it was made from, to compare with when it is added again."""
    awaited: bool = True
    """True where the service is not ready before this teacher is up; False for one added later."""
    cached: CachedTeacher | None = None
    """The cache in front of the pool, or None when nothing is kept or the teacher is not up."""
    _pool: ReplicaPool | None = None
    _admitted: Teacher | None = None
    _task: asyncio.Task[None] | None = None
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _in_flight: _InFlight = field(default_factory=_InFlight)
    _draining: bool = False

    @property
    def state(self) -> State:
        """Stage of the teacher's life; one whose engine is being replaced is `starting` again."""
        if self._task is None or self._stopping.is_set():
            return "stopped" if self._stopping.is_set() else "starting"
        if self._task.done():
            return "failed"
        if self._draining:
            return "draining"
        return "starting" if self._pool is None else self._pool.state

    @property
    def in_order(self) -> bool:
        """True where this teacher is no reason to call the service unready."""
        # A teacher that is being removed may take long to close, while the others work.
        return self.state in ("ready", "draining", "stopped") or (self._pool is None and not self.awaited)

    @property
    def failure(self) -> str:
        """Failure of a teacher in the state `failed`, in one line; else empty."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            error = self._task.exception()
            return "" if error is None else _one_line(error)
        return "" if self._pool is None else self._pool.failure

    @property
    def pool(self) -> ReplicaPool:
        """The replicas, without the cache in front. A pool that is `starting` again has calls wait for it.

        Raises:
            Unavailable: not up yet, or not any more. TeacherFailed: it did not start, and will not by itself.
        """
        if self.state == "failed" and self._pool is None:
            raise TeacherFailed(f"teacher {self.name!r} did not start: {self.failure}")
        if self._pool is None or self._stopping.is_set() or self._task is None or self._task.done():
            raise Unavailable(f"teacher {self.name!r} is {self.state}; retry later")
        return self._pool

    def front(self, *, store: bool) -> TeacherFront:
        """The teacher that scores one request: the cache, admission and the pool, or without `store` the latter two.

        Raises:
            Unavailable: not up yet, or not any more.
        """
        pool = self.pool
        if self._draining:
            raise Unavailable(f"teacher {self.name!r} is being removed")
        return TeacherFront(self.cached if store else None, self._admitted or pool, self._in_flight)

    def start(self, admission: Admission | None = None) -> None:
        """Begin to open the teacher, behind `admission` if one is given; `settled` tells when it is up."""
        self._task = asyncio.create_task(self._run(admission), name=f"teacher {self.name}")
        self._task.add_done_callback(lambda _: self._settled.set())

    async def settled(self) -> None:
        """Wait until the teacher is up.

        Raises:
            PotstillError: it did not start; of the class of its failure, else `TeacherFailed`.
            Unavailable: it was stopped before it was up.
        """
        await self._settled.wait()
        if self._task is None or not self._task.done():
            return
        failure = None if self._task.cancelled() else self._task.exception()
        if isinstance(failure, PotstillError):
            raise type(failure)(f"teacher {self.name!r} did not start: {failure.detail}") from failure
        if failure is not None:
            _LOG.error("teacher %r did not start", self.name, exc_info=failure)
            raise TeacherFailed(f"teacher {self.name!r} did not start: {_one_line(failure)}") from failure
        if self._pool is None:
            raise Unavailable(f"teacher {self.name!r} was stopped before it was up")

    async def drain(self, *, no_engine_seconds: float = _NO_ENGINE_SECONDS) -> None:
        """Take no more calls of `front`, and wait until none is in flight.

        Args:
            no_engine_seconds: wait no longer than this for calls that have no engine because it is being restarted.
        """
        self._draining = True
        ready_at = time.monotonic()
        while not self._in_flight.none.is_set() and time.monotonic() - ready_at < no_engine_seconds:
            # Woken at times to look at the pool: an engine that comes back starts the patience anew.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_SECONDS, no_engine_seconds)):
                    await self._in_flight.none.wait()
            if self._pool is not None and self._pool.state == "ready":
                ready_at = time.monotonic()

    async def stop(self) -> None:
        """Close everything; a start that is under way is given up. Raises what goes wrong while closing."""
        self._stopping.set()
        if self._task is None:
            return
        if self._pool is None:
            self._task.cancel()  # a start does not look at `_stopping`
        await asyncio.wait([self._task])
        failure = None if self._task.cancelled() else self._task.exception()
        if failure is not None and self._pool is not None:  # a failed start was told by `settled`
            raise failure

    async def _run(self, admission: Admission | None) -> None:
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(self.open_pool(self.open_teacher))
            self._admitted = pool
            if admission is not None:
                self._admitted = await stack.enter_async_context(AdmittedTeacher.open(pool, admission, self.name))
                queue = admission.queues[self.name]
                pool.follow_queue(lambda: queue.tokens_waiting)
            if self.keep is not None:
                from potstill.cache.read_through import CachedTeacher  # noqa: PLC0415  zarr and obstore, only when used
                from potstill.cache.targets.names import require_one_identity  # noqa: PLC0415

                await asyncio.to_thread(require_one_identity, self.keep.cache.root, self.name, pool.identity)
                await asyncio.to_thread(_warn_of_prefixes, self.keep.cache, self.name, pool.identity)
                self.cached = await stack.enter_async_context(
                    CachedTeacher.open(self._admitted, name=self.name, cache=self.keep.cache, policy=self.keep.policy)
                )
            self._pool = pool  # last: a request must find all that is in front of it open
            self._settled.set()
            await self._stopping.wait()


class TeacherFront(WrappedTeacher):
    """A `Teacher` that asks the cache, then admission for the rows it misses. A removal waits for its calls."""

    def __init__(self, cached: CachedTeacher | None, admitted: Teacher, in_flight: _InFlight) -> None:
        super().__init__(admitted)
        self._cached = cached
        self._in_flight = in_flight

    async def score(
        self, rows: Sequence[Tokens], want: Fields, *, before_waiting: Callable[[], None] = lambda: None
    ) -> list[Targets]:
        """Look the rows up, and have those that are missing wait their turn for the engine.

        Args:
            rows: each [T] token ids.
            want: fields of every row.
            before_waiting: called where any row is missing; if it raises, no row waits.

        Raises:
            What `before_waiting`, the cache, admission and the pool do.
        """
        with self._in_flight.call():
            if self._cached is None:
                before_waiting()
                return await self.inner.score(rows, want)
            lookup = await self._cached.look_up(rows, want)
            if lookup.missing:
                before_waiting()
            return await self._cached.complete(lookup)


def _warn_of_prefixes(cache: Cache, name: str, identity: TeacherIdentity) -> None:
    """Log what is wrong with the beginning of the rows of those corpora that the teacher may be asked to fill."""
    from potstill.cache.targets.prefixes import prefix_warning  # noqa: PLC0415

    def look(corpus_name: str) -> str:
        corpus = cache.corpus(corpus_name)
        fits = corpus.tokenizer_sha256 == identity.tokenizer_sha256
        return prefix_warning(name, corpus, identity) if fits else ""

    for warning in filter(None, cache.look_at_corpora(look).found.values()):
        _LOG.warning("%s", warning)


def _one_line(error: BaseException) -> str:
    if isinstance(error, PotstillError):
        return error.detail
    return " ".join(f"{type(error).__name__}: {error}".split())
