"""Replica pools: a teacher made of equal replicas. Here the protocol, and the pool of one engine in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from potstill.cache.errors import LimitExceeded, PotstillError, SpecMismatch, TeacherFailed, Unavailable
from potstill.cache.types import Fields, Targets, Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.replicas.health import EngineHealth
from potstill.teacher_service.settings import AutoscaleSettings

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_SECONDS = 300.0  # between starts that fail: seldom enough to spare the log, often enough to recover

OpenTeacher: TypeAlias = Callable[[], AbstractAsyncContextManager[Teacher]]
PoolState: TypeAlias = Literal["starting", "ready", "failed"]
ReplicaState: TypeAlias = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """State and work of one replica."""

    name: str
    state: ReplicaState
    tokens_waiting: int
    """Tokens sent to it and not answered."""
    tokens_scored: int
    """Tokens answered by it since this service began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """Replicas ready (`replicas`), wanted (`target`) and possible (`min`, `max`): the JSON of `.../replicas`."""

    replicas: int
    target: int
    max: int
    min: int = 1
    each: tuple[ReplicaInfo, ...] = ()


class ReplicaPool(Teacher, Protocol):
    """A `Teacher` made of equal replicas; their identities are the same."""

    @property
    def state(self) -> PoolState:
        """`ready` when at least one replica is; `starting` when one will be; `failed` when none starts."""

    @property
    def failure(self) -> str:
        """Reason for which it is not `ready`, in one line; else empty."""

    @property
    def status(self) -> ReplicaStatus:
        """Numbers of replicas, and each one's state."""

    async def scale(self, num_replicas: int) -> ReplicaStatus:
        """Ask for another number of replicas; returns before they are up, which the status tells.

        Raises:
            LimitExceeded: this pool cannot have that many. InvalidInput: the pool is autoscaled.
        """

    async def autoscale(self, limits: AutoscaleSettings | None) -> ReplicaStatus:
        """Let the number follow the waiting tokens within `limits`; None ends that and leaves the number as it is.

        Raises:
            LimitExceeded: this pool cannot have that many.
        """

    def follow_queue(self, tokens_queued: Callable[[], int]) -> None:
        """Have autoscaling count the tokens that wait in front of this pool too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Times and counts by which a pool looks after its engine."""

    wedged_seconds: float = 120.0
    """An engine that has work and finishes no step (at most `max_batch_tokens` tokens) for so long is replaced."""
    check_seconds: float = 1.0
    """Time between two looks at the engine."""
    close_seconds: float = 60.0
    """Time for a broken engine to close, or a given-up start to end, before it is left behind."""
    pause_seconds: float = 1.0
    """Pause after a failed start; doubled each time, up to five minutes."""
    starts: int = 3
    """Failed starts in a row until the teacher counts as failed. Starts go on even then, ever more seldom."""


class LocalPool(WrappedTeacher):
    """A pool of one engine inside this process; a dead or wedged one is replaced by a fresh one. Open with `open`.

    While it is replaced, calls wait, and those that were in flight are scored again. A call that loses two
    engines fails, as its rows may have killed them.
    """

    def __init__(self, open_teacher: OpenTeacher, watch: Watch) -> None:
        self._open_teacher = open_teacher
        self._watch = watch
        self._engine: _Engine | None = None
        self._scored_before = 0
        self._failed_starts = 0
        self._failure = ""
        self._starting = False
        self._news = asyncio.Event()
        self._suspects = 0
        self._alone = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    @asynccontextmanager
    async def open(cls, open_teacher: OpenTeacher, watch: Watch | None = None) -> AsyncIterator[LocalPool]:
        """Start the engine, and close it at the end of the block.

        Raises:
            What opening the teacher raises: a first start that fails is not tried again.
        """
        pool = cls(open_teacher, watch or Watch())
        # One task opens and closes every engine, as what is opened may have to be closed by the same task.
        keeper = asyncio.create_task(pool._keep_engine(), name="engine keeper")
        try:
            await asyncio.wait({keeper, pool._opened}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pool._stopping.set()
            await pool._end(keeper)
            raise
        if keeper.done():
            keeper.result()  # raises the failure of the first start
        try:
            yield pool
        finally:
            pool._stopping.set()
            pool._tell()
            await pool._end(keeper)
        if keeper.done() and not keeper.cancelled():
            keeper.result()

    @property
    def state(self) -> PoolState:
        """`starting` while an engine is replaced, `failed` after several failed starts in a row."""
        if self._engine is not None:
            return "ready"
        return "failed" if self._failed_starts >= self._watch.starts else "starting"

    @property
    def failure(self) -> str:
        """Reason for which there is no engine right now; empty when there is one."""
        return "" if self._engine is not None else self._failure

    @property
    def status(self) -> ReplicaStatus:
        """The status of the one replica."""
        health = self._engine.health if self._engine is not None else None
        info = ReplicaInfo(
            name="in-process",
            state=self.state,
            tokens_waiting=health.tokens_waiting if health else 0,
            tokens_scored=self._scored_before + (health.tokens_scored if health else 0),
        )
        return ReplicaStatus(replicas=int(info.state == "ready"), target=1, max=1, each=(info,))

    async def scale(self, num_replicas: int) -> ReplicaStatus:
        """Accept the number 1 and nothing else.

        Raises:
            LimitExceeded: any other number.
        """
        if num_replicas != 1:
            raise LimitExceeded(
                f"{num_replicas} replicas were asked for, but a teacher inside the service process has "
                "exactly 1; more replicas need Ray"
            )
        return self.status

    async def autoscale(self, limits: AutoscaleSettings | None) -> ReplicaStatus:
        """Accept None, or limits whose maximum is 1.

        Raises:
            LimitExceeded: any other limits.
        """
        return self.status if limits is None else await self.scale(limits.max)

    def follow_queue(self, tokens_queued: Callable[[], int]) -> None:
        """Do nothing: there is exactly one replica."""

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score on the engine; see `potstill.cache.types.Teacher`.

        Raises:
            TeacherFailed: no engine starts any more, or these rows lost two engines, the second with no other call.
            Unavailable: the teacher is closed.
        """
        try:
            return await (await self._unsuspected()).score(rows, want)
        except _EngineLost as lost:
            _LOG.info("%s; its rows are scored again", lost)
        # Any call that the lost engine had may have killed it, so each is tried again with an engine to itself.
        self._suspects += 1
        try:
            async with self._alone:
                return await (await self._running()).score(rows, want)
        except _EngineLost as lost:
            raise TeacherFailed(
                f"two engines were lost while they scored these rows, the second one with no other call: {lost}"
            ) from lost
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._tell()

    async def _unsuspected(self) -> _Engine:
        """The engine, for a call that has lost none; waits while calls that have are tried again, each alone."""
        while True:
            engine = await self._running()
            if not self._suspects:
                return engine
            await self._news.wait()

    async def _running(self) -> _Engine:
        while self._engine is None or self._engine.lost.done():
            if self._stopping.is_set():
                raise Unavailable("the teacher is closed")
            if self.state == "failed":
                raise TeacherFailed(f"the engine does not start any more: {self._failure}")
            await self._news.wait()
        return self._engine

    def _tell(self) -> None:
        """Wake everybody who waits for an engine."""
        # Exchanged and not cleared: who is woken holds the old event, and who comes next waits for further news.
        self._news.set()
        self._news = asyncio.Event()

    async def _keep_engine(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._run_engine()
            except Exception as error:
                if not self._opened.done() or self._stopping.is_set():
                    raise
                self._failed_starts += 1
                self._failure = error.detail if isinstance(error, PotstillError) else f"{type(error).__name__}: {error}"
                _LOG.exception("the engine did not start again (%d in a row)", self._failed_starts)
                self._tell()
                # The exponent is bounded because the power overflows after a thousand failed starts.
                pause = self._watch.pause_seconds * 2.0 ** min(self._failed_starts - 1, 30)
                await _wait(self._stopping, min(pause, _LONGEST_PAUSE_SECONDS))

    async def _run_engine(self) -> None:
        """Start one engine, watch it, and close it."""
        # Entered by hand: a broken engine is closed in another way than a sound one.
        manager = self._open_teacher()
        self._starting = True
        try:
            teacher = await manager.__aenter__()
        finally:
            self._starting = False
        engine = _Engine(teacher, self._watch.wedged_seconds)
        try:
            self._accept(engine)
            await self._watch_engine(engine)
        finally:
            self._engine = None
            self._scored_before += engine.health.tokens_scored
            if engine.lost.done():
                await self._abandon(manager)
            else:
                await manager.__aexit__(None, None, None)

    async def _end(self, keeper: asyncio.Task[None]) -> None:
        """Wait until the engine is closed; a start under way is given up, and left behind if it does not end."""
        if not self._starting:
            await asyncio.wait({keeper})
            return
        # Nothing else interrupts a start: only an engine that is there sees `_stopping`.
        keeper.cancel()
        seconds = self._watch.close_seconds
        await asyncio.wait({keeper}, timeout=seconds)
        if not keeper.done():
            _LOG.error(
                "the start of an engine did not end within %g seconds of being given up, and is left behind", seconds
            )

    def _accept(self, engine: _Engine) -> None:
        if self._opened.done() and self.identity != engine.teacher.identity:
            differences = self.identity.differences(engine.teacher.identity)
            raise SpecMismatch(f"the restarted teacher is another one: {differences}")
        self.inner, self._engine = engine.teacher, engine
        self._failed_starts, self._failure = 0, ""
        if not self._opened.done():
            self._opened.set_result(None)
        self._tell()

    async def _watch_engine(self, engine: _Engine) -> None:
        """Look after the engine until it is lost or the pool stops."""
        while not await _wait(self._stopping, self._watch.check_seconds, engine.lost):
            trouble = engine.health.trouble()
            if trouble:
                engine.lose(trouble)
        if engine.lost.done():
            self._failure = engine.lost.result()
            _LOG.error("the engine is replaced: %s", self._failure)

    async def _abandon(self, manager: AbstractAsyncContextManager[Teacher]) -> None:
        """Close a broken engine as far as it lets itself be closed."""
        seconds = self._watch.close_seconds
        try:
            async with asyncio.timeout(seconds):
                await manager.__aexit__(None, None, None)
        except Exception:  # noqa: BLE001 -- there is a fresh engine to start, whatever this one does
            _LOG.exception("a broken engine did not close cleanly within %g seconds and is left behind", seconds)


class _EngineLost(Exception):
    """The engine ended or is wedged; the rows are not known to be at fault."""


class _Engine:
    """One engine, and the calls that depend on it."""

    def __init__(self, teacher: Teacher, wedged_seconds: float) -> None:
        self.teacher = teacher
        self.health = EngineHealth(teacher, wedged_seconds=wedged_seconds)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def lose(self, cause: str) -> None:
        """Give the engine up, which ends every call that waits for it."""
        if not self.lost.done():
            self.lost.set_result(cause)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """See `potstill.cache.types.Teacher`. Raises `_EngineLost` too."""
        call = asyncio.ensure_future(self.teacher.score(rows, want))
        try:
            with self.health.call(sum(map(len, rows))):
                either: set[asyncio.Future[Any]] = {call, self.lost}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not call.done():
                    raise _EngineLost(self.lost.result())
                return call.result()
        except (TeacherFailed, Unavailable) as error:
            # Looked at now: the next look of `_watch_engine` comes later than the error that a dead engine's calls get.
            trouble = self.health.trouble()
            if not trouble:
                raise
            self.lose(trouble)
            raise _EngineLost(trouble) from error
        finally:
            call.cancel()  # and not awaited: in a wedged engine it may never end


async def _wait(stopping: asyncio.Event, seconds: float, *others: asyncio.Future[str]) -> bool:
    """Sleep up to `seconds`; True as soon as `stopping` is set or another future is done."""
    told = asyncio.ensure_future(stopping.wait())
    try:
        any_of: set[asyncio.Future[Any]] = {told, *others}
        done, _ = await asyncio.wait(any_of, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
    return bool(done)
