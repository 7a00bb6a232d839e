"""Admission in front of a fake engine, and keys that ask it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np

from potstill.cache import Fields, Targets
from potstill.cache.read_through.cached_teacher import CachedTeacher
from potstill.cache.types import Tokens
from potstill.teacher_service.access.auth import Caller, Role, caller
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.admission.admission import Admission, AdmittedTeacher
from potstill.teacher_service.replicas.pool import LocalPool
from potstill.teacher_service.settings.service import LimitSettings
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import opens

WANT = Fields(k=2)


def row(number: int, tokens: int = 10) -> Tokens:
    """Another row for each number."""
    digits = np.array([number // 64**place % 64 for place in range(3)], np.uint32)
    return np.concatenate([digits, np.full(tokens - 3, 7, np.uint32)])


class HeldTeacher(FakeTeacher):
    """Scores when it is let go; counts what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.tokens_inside = 0
        self.most_inside = 0

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        size = sum(map(len, rows))
        self.tokens_inside += size
        self.most_inside = max(self.most_inside, self.tokens_inside)
        try:
            await self.gate.wait()
            return await super().score(rows, want)
        finally:
            self.tokens_inside -= size


@dataclass(frozen=True, slots=True)
class Admitted:
    teacher: AdmittedTeacher
    admission: Admission

    @property
    def tokens_waiting(self) -> int:
        return self.admission.queues["smol"].tokens_waiting


@asynccontextmanager
async def admitted(engine: FakeTeacher, **limits: int) -> AsyncIterator[Admitted]:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(LocalPool.open(opens(engine)))
        admission = Admission(LimitSettings(**limits))
        teacher = await stack.enter_async_context(AdmittedTeacher.open(pool, admission, "smol"))
        yield Admitted(teacher, admission)


def ask(
    teacher: AdmittedTeacher | CachedTeacher, rows: Sequence[Tokens], key: str = "a", quota: Quota | None = None
) -> asyncio.Task[list[Targets]]:
    """Score as this key, in the background."""

    async def as_key() -> list[Targets]:
        caller.set(Caller(key, Role.TRAINER, quota or Quota()))
        return await teacher.score(rows, WANT)

    return asyncio.create_task(as_key())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
