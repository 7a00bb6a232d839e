"""A pool of replicas that can be scaled without an engine: it counts, and every replica is the same teacher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from potstill.cache import Fields, Targets
from potstill.cache.errors import LimitExceeded
from potstill.cache.types import Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.replicas.pool import OpenTeacher, PoolState, ReplicaInfo, ReplicaStatus
from potstill.teacher_service.settings.replicas import AutoscaleSettings
from tests.support.processes.servers import opens


class CountedPool(WrappedTeacher):
    """Replicas become ready `start_seconds` after they are asked for; calls go round."""

    def __init__(self, teacher: Teacher, *, replicas: int, most: int, start_seconds: float) -> None:
        super().__init__(teacher)
        self._target = self._ready = replicas
        self._most = most
        self._start_seconds = start_seconds
        self._scored = [0] * most
        self._waiting = [0] * most
        self._calls = 0
        self._starting: asyncio.Task[None] | None = None

    @property
    def state(self) -> PoolState:
        return "ready" if self._ready else "starting"

    @property
    def failure(self) -> str:
        return ""

    @property
    def status(self) -> ReplicaStatus:
        each = tuple(
            ReplicaInfo(
                name=f"replica-{i}",
                state="ready" if i < self._ready else "starting",
                tokens_waiting=self._waiting[i],
                tokens_scored=self._scored[i],
            )
            for i in range(max(self._ready, self._target))
        )
        return ReplicaStatus(replicas=self._ready, target=self._target, max=self._most, each=each)

    async def scale(self, num_replicas: int) -> ReplicaStatus:
        if num_replicas > self._most:
            raise LimitExceeded(f"{num_replicas} replicas are over the {self._most} that this cluster has room for")
        self._target = num_replicas
        self._starting = asyncio.create_task(self._start())
        return self.status

    async def _start(self) -> None:
        await asyncio.sleep(self._start_seconds)
        self._ready = self._target

    async def autoscale(self, limits: AutoscaleSettings | None) -> ReplicaStatus:
        raise LimitExceeded("this pool is not autoscaled")

    def follow_queue(self, tokens_queued: Callable[[], int]) -> None:
        """Nothing here follows it."""

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        index = self._calls % self._ready
        self._calls += 1
        tokens = sum(map(len, rows))
        self._waiting[index] += tokens
        try:
            targets = await self.inner.score(rows, want)
        finally:
            self._waiting[index] -= tokens
        self._scored[index] += tokens
        return targets


def hosted_pool(
    name: str,
    teacher: Teacher,
    keep: Keep | None = None,
    *,
    replicas: int = 1,
    most: int = 4,
    start_seconds: float = 0.5,
) -> HostedTeacher:
    """A teacher whose replicas can be scaled."""

    @asynccontextmanager
    async def open_pool(open_teacher: OpenTeacher) -> AsyncIterator[CountedPool]:
        async with open_teacher() as opened:
            yield CountedPool(opened, replicas=replicas, most=most, start_seconds=start_seconds)

    return HostedTeacher(name, opens(teacher), keep, open_pool=open_pool)
