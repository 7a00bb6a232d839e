"""Teachers that do not start, are stopped while they start, or do not close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Fields
from potstill.cache.errors import InvalidInput, TeacherFailed, Unavailable
from potstill.cache.read_through import KeepPolicy
from potstill.cache.types import Teacher
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.replicas.pool import LocalPool
from tests.support.corpora import make_corpus, teacher_for
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import opens
from tests.support.waiting import eventually


async def test_a_teacher_that_does_not_start_says_so() -> None:
    @asynccontextmanager
    async def failing(error: Exception) -> AsyncIterator[Teacher]:
        raise error
        yield

    for error, cls, words in (
        (RuntimeError("no memory"), TeacherFailed, "RuntimeError: no memory"),
        (InvalidInput("bad option"), InvalidInput, "bad option"),
    ):
        teacher = HostedTeacher("smol", lambda error=error: failing(error))  # type: ignore[misc]
        teacher.start()
        with pytest.raises(cls, match=f"'smol' did not start.*{words}"):
            await teacher.settled()
        assert teacher.state == "failed"
        with pytest.raises(TeacherFailed, match=f"'smol' did not start.*{words}"):  # not: come back later
            _ = teacher.pool
        await teacher.stop()


async def test_a_start_that_is_under_way_is_given_up() -> None:
    closed = []

    @asynccontextmanager
    async def never() -> AsyncIterator[Teacher]:
        try:
            await asyncio.Event().wait()
            yield FakeTeacher()
        finally:
            closed.append(True)

    teacher = HostedTeacher("smol", never)
    teacher.start()
    await asyncio.sleep(0)
    waiting = asyncio.create_task(teacher.settled())
    await asyncio.sleep(0)
    await teacher.stop()
    assert closed == [True]
    with pytest.raises(Unavailable, match="stopped before"):
        await waiting


async def test_what_goes_wrong_while_closing_is_raised_after_all_are_closed() -> None:
    closed = []

    def opening(name: str) -> Callable[[], AbstractAsyncContextManager[Teacher]]:
        @asynccontextmanager
        async def open_it() -> AsyncIterator[Teacher]:
            yield FakeTeacher()
            closed.append(name)
            raise TeacherFailed(f"{name} does not close")

        return open_it

    service = Service([HostedTeacher(name, opening(name)) for name in ("a", "b")])
    with pytest.raises(TeacherFailed, match="a does not close"):
        async with service.running():
            await service.started()
    assert sorted(closed) == ["a", "b"]


async def test_a_teacher_that_does_not_start_is_told_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[Teacher]:
        raise TeacherFailed("it has no weights")
        yield

    service = Service([HostedTeacher("bad", broken), HostedTeacher("good", opens(FakeTeacher()))])
    async with service.running():
        await service.started()
        assert {name: teacher.state for name, teacher in service.teachers.items()} == {"bad": "failed", "good": "ready"}
        assert not service.ready
        with pytest.raises(TeacherFailed, match="'bad' did not start: it has no weights"):
            _ = service.teacher("bad").pool
        assert b"potstill_teacher_state" in service.metrics.text()
    assert [record.getMessage() for record in caplog.records] == [
        "teacher_failed: teacher 'bad' did not start: it has no weights"
    ]
    service = Service([HostedTeacher(name, broken) for name in ("a", "b")])
    with pytest.raises(TeacherFailed, match="'a' did not start"):
        async with service.running():
            await service.started()


async def test_a_service_is_ready_while_a_teacher_that_was_removed_closes() -> None:
    closing = asyncio.Event()

    @asynccontextmanager
    async def slow_to_close() -> AsyncIterator[Teacher]:
        yield FakeTeacher()
        await closing.wait()

    service = Service([HostedTeacher("own", opens(FakeTeacher())), HostedTeacher("going", slow_to_close)])
    async with service.running():
        await service.started()
        service.admin.remove(service.teacher("going"))
        await eventually(lambda: service.teachers["going"].state == "stopped")
        ready = service.ready
        closing.set()  # before anything is asserted: the service waits for it at its end
        assert ready
        await eventually(lambda: "going" not in service.teachers)
        assert service.ready


async def test_a_pool_is_a_teacher() -> None:
    teacher = FakeTeacher()
    async with LocalPool.open(opens(teacher)) as pool:
        assert (pool.identity, pool.provenance) == (teacher.identity, teacher.provenance)
        row = np.arange(5, dtype=np.uint32)
        (targets,) = await pool.score([row], Fields(k=3))
    np.testing.assert_array_equal(targets.ids, teacher.distribution(row, 3).ids)


async def test_rows_with_the_prefix_in_front_already_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    prefix = (int(corpus.row(0)[0]),)
    keep = Keep(cache, KeepPolicy())
    for name, prefix_ids, sha in (("twice", prefix, ""), ("once", (), ""), ("stranger", prefix, "1" * 64)):
        identity = teacher_for(corpus).identity
        identity = replace(identity, prefix_ids=prefix_ids, tokenizer_sha256=sha or corpus.tokenizer_sha256)
        service = Service([HostedTeacher(name, opens(FakeTeacher(identity)), keep)], cache=cache)
        async with service.running():
            await service.started()
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("twice on docs: ")
    assert told.endswith("the teacher's prefix_ids put it in front again; leave the option out")
