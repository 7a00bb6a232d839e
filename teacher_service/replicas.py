"""Teachers as the service holds them: a pool of replicas, and its life from start to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from cache.errors import LimitExceeded, PotstillError, TeacherFailed, Unavailable
from cache.types import Fields, Provenance, Targets, Teacher, TeacherIdentity, TeacherLimits, Tokens

if TYPE_CHECKING:
    from cache.cache import Cache
    from cache.cached import CachedTeacher, KeepPolicy

_LOG = logging.getLogger(__name__)
State: TypeAlias = Literal["starting", "ready", "stopped", "failed"]
OpenTeacher: TypeAlias = Callable[[], AbstractAsyncContextManager[Teacher]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """How many engines run, how many are wanted, and how many there can be."""

    replicas: int
    target: int
    max: int


class ReplicaPool:
    """A teacher made of equal replicas. In process there is exactly one."""

    def __init__(self, replica: Teacher) -> None:
        self._replica = replica

    @property
    def identity(self) -> TeacherIdentity:
        """Of every replica; they are equal."""
        return self._replica.identity

    @property
    def provenance(self) -> Provenance:
        """What produces the numbers right now."""
        return self._replica.provenance

    @property
    def limits(self) -> TeacherLimits:
        """What every replica accepts."""
        return self._replica.limits

    @property
    def status(self) -> ReplicaStatus:
        """Running, wanted and possible replicas."""
        return ReplicaStatus(replicas=1, target=1, max=1)

    async def scale(self, num_replicas: int) -> ReplicaStatus:
        """Ask for another number of replicas.

        Raises:
            LimitExceeded: this pool cannot have that many.
        """
        if num_replicas != 1:
            raise LimitExceeded(
                f"{num_replicas} replicas were asked for, but a teacher inside the service process has "
                "exactly 1; more replicas need Ray"
            )
        return self.status

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score on one replica; see `cache.types.Teacher`."""
        return await self._replica.score(rows, want)


@dataclass(frozen=True, slots=True)
class Keep:
    """Where and how the answers of a teacher are kept."""

    cache: Cache
    policy: KeepPolicy


class HostedTeacher:
    """A named teacher that starts in the background and is there once its engine is up.

    One task opens everything, waits for the stop and closes everything in reverse order, so every
    resource is closed by the task that opened it.
    """

    def __init__(self, name: str, open_teacher: OpenTeacher, keep: Keep | None = None) -> None:
        self.name = name
        self._open_teacher = open_teacher
        self._keep = keep
        self._pool: ReplicaPool | None = None
        self._cached: CachedTeacher | None = None
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def state(self) -> State:
        """Where in its life the teacher is."""
        if self._task is None or self._stopping.is_set():
            return "stopped" if self._stopping.is_set() else "starting"
        if self._task.done():
            return "failed"
        return "starting" if self._pool is None else "ready"

    @property
    def pool(self) -> ReplicaPool:
        """The replicas, without the cache in front.

        Raises:
            Unavailable: not up yet, or not any more.
        """
        if self._pool is None or self.state != "ready":
            raise Unavailable(f"teacher {self.name!r} is {self.state}; retry later")
        return self._pool

    @property
    def cached(self) -> CachedTeacher | None:
        """The cache in front of the pool, or None when nothing is kept or the teacher is not up."""
        return self._cached

    def front(self, *, store: bool) -> Teacher:
        """What a request is scored by: through the cache, or straight by the pool.

        Raises:
            Unavailable: not up yet, or not any more.
        """
        pool = self.pool
        return self._cached if store and self._cached is not None else pool

    def start(self) -> None:
        """Begin to open the teacher; `settled` tells when it is up."""
        self._task = asyncio.create_task(self._run(), name=f"teacher {self.name}")
        self._task.add_done_callback(lambda _: self._settled.set())

    async def settled(self) -> None:
        """Wait until the teacher is up.

        Raises:
            TeacherFailed: it did not start. PotstillError: the same, of the class of its own failure.
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
            cause = f"{type(failure).__name__}: {failure}"
            raise TeacherFailed(f"teacher {self.name!r} did not start: {cause}") from failure
        if self._pool is None:
            raise Unavailable(f"teacher {self.name!r} was stopped before it was up")

    async def stop(self) -> None:
        """Close everything; a start that is under way is given up. Raises what goes wrong while closing."""
        self._stopping.set()
        if self._task is None:
            return
        if self._pool is None:
            self._task.cancel()
        await asyncio.wait([self._task])
        failure = None if self._task.cancelled() else self._task.exception()
        if failure is not None and self._pool is not None:
            raise failure

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            pool = ReplicaPool(await stack.enter_async_context(self._open_teacher()))
            if self._keep is not None:
                from cache.cached import CachedTeacher  # noqa: PLC0415  zarr and obstore, only when used

                opened = CachedTeacher.open(pool, name=self.name, cache=self._keep.cache, policy=self._keep.policy)
                self._cached = await stack.enter_async_context(opened)
            self._pool = pool
            self._settled.set()
            await self._stopping.wait()
