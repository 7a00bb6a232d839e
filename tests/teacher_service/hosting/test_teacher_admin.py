"""A failed teacher whose place is taken: what it leaves outside goes by the name of the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from potstill.cache.errors import Unavailable
from potstill.cache.types import Teacher
from potstill.teacher_service.admission.admission import Admission
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.teacher_admin import TeacherAdmin
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.replicas.pool import LocalPool, OpenTeacher, PoolState, ReplicaPool
from potstill.teacher_service.settings.service import LimitSettings, TeacherSettings
from tests.support.fakes import FakeTeacher
from tests.support.waiting import eventually

BIG = TeacherSettings(name="big", model="m")


class LostPool(LocalPool):
    """One whose replicas are gone once it is up."""

    failed = False

    @property
    def state(self) -> PoolState:
        return "failed" if self.failed else super().state


class Generations(TeacherSource):
    """Makes teachers that note when they open and close; the first is lost, and closes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.closing = asyncio.Event()
        self.pools: list[LostPool] = []
        self._made = 0

    def host(self, settings: TeacherSettings) -> HostedTeacher:
        self._made += 1
        number = self._made

        @asynccontextmanager
        async def open_teacher() -> AsyncIterator[Teacher]:
            self.events.append(f"open {number}")
            yield FakeTeacher()

        @asynccontextmanager
        async def open_pool(opens: OpenTeacher) -> AsyncIterator[ReplicaPool]:
            async with LostPool.open(opens) as pool:
                assert isinstance(pool, LostPool)
                self.pools.append(pool)
                yield pool
            if number == 1:
                await self.closing.wait()
            self.events.append(f"closed {number}")

        return HostedTeacher(settings.name, open_teacher, open_pool=open_pool, settings=settings)


async def lost() -> tuple[Generations, TeacherAdmin, dict[str, HostedTeacher]]:
    source, teachers = Generations(), dict[str, HostedTeacher]()
    admin = TeacherAdmin(teachers, source, Admission(LimitSettings()))
    assert await admin.add(BIG)
    source.pools[0].failed = True
    assert teachers["big"].state == "failed"
    return source, admin, teachers


async def test_a_failed_teacher_is_closed_before_the_next_one_starts() -> None:
    source, admin, teachers = await lost()
    failed = teachers["big"]
    adding = asyncio.create_task(admin.add(BIG))
    await eventually(lambda: failed.state == "stopped")
    assert not await admin.add(BIG)
    source.closing.set()
    assert await adding
    assert source.events == ["open 1", "closed 1", "open 2"]
    assert teachers["big"].state == "ready"
    await teachers["big"].stop()


async def test_a_teacher_that_is_removed_while_it_waits_for_the_failed_one_never_starts() -> None:
    source, admin, teachers = await lost()
    failed = teachers["big"]
    adding = asyncio.create_task(admin.add(BIG))
    await eventually(lambda: failed.state == "stopped")
    admin.remove(teachers["big"])
    await eventually(lambda: not teachers)
    with pytest.raises(Unavailable, match="being removed"):
        await admin.add(BIG)
    source.closing.set()
    with pytest.raises(Unavailable, match="removed before it started"):
        await adding
    assert source.events == ["open 1", "closed 1"]
    assert await admin.add(BIG)
    await teachers["big"].stop()
