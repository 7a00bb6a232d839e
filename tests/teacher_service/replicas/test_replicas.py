"""The pool of one engine: what becomes of calls when it dies or is wedged. The engines here are real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.errors import InvalidInput, LimitExceeded, TeacherFailed, Unavailable
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Teacher
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.replicas.health import EngineHealth, Watched
from potstill.teacher_service.replicas.pool import LocalPool, OpenTeacher, Watch
from potstill.teacher_service.settings.replicas import AutoscaleSettings
from tests.support.contracts import rows
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.process_teacher import DEADLY, ProcessTeacher, opens_process_teacher
from tests.support.processes.servers import opens
from tests.support.waiting import eventually

# Long beside the steps of a healthy engine, also where it gets a core only now and then.
QUICK = Watch(wedged_seconds=1.5, check_seconds=0.02, pause_seconds=0.02)
PATIENT = Watch(wedged_seconds=60.0, check_seconds=0.02, pause_seconds=0.02)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("number", "watch"), [(signal.SIGKILL, PATIENT), (signal.SIGSTOP, QUICK)])
async def test_rows_in_flight_are_scored_by_a_fresh_engine(number: signal.Signals, watch: Watch) -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(tokens_per_second=200.0, opened=engines.append), watch) as pool:
        await pool.score(rows(3), Fields(k=4))
        asked = rows(9, 4, 21)
        calls = [asyncio.create_task(pool.score([row], Fields(k=4))) for row in asked]
        await eventually(lambda: pool.status.each[0].tokens_waiting == 34)
        os.kill(engines[0].pid, number)
        answers = [answer for call in calls for answer in await call]
        for row, answer in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(answer.ids, FakeTeacher().distribution(row, 4).ids)
        assert len(engines) == 2
        assert not is_running(engines[0].pid)
        assert pool.state == "ready"
        assert pool.failure == ""
        assert pool.status.each[0].tokens_scored == 37


async def test_an_engine_that_dies_while_nothing_waits_is_noticed_and_replaced() -> None:
    engines: list[ProcessTeacher] = []
    hosted = HostedTeacher(
        "smol",
        opens_process_teacher(opened=engines.append),
        open_pool=lambda open_teacher: LocalPool.open(open_teacher, PATIENT),
    )
    hosted.start()
    await hosted.settled()
    states = [hosted.state]
    os.kill(engines[0].pid, signal.SIGKILL)

    def back_again() -> bool:
        if hosted.state != states[-1]:
            states.append(hosted.state)
        return len(engines) == 2 and hosted.state == "ready"

    await eventually(back_again)
    assert states == ["ready", "starting", "ready"]
    assert len(await hosted.front(store=True).score(rows(5), Fields(k=4))) == 1
    await hosted.stop()


async def test_rows_that_an_engine_dies_of_cost_two_engines_and_not_more() -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(opened=engines.append), PATIENT) as pool:
        deadly = np.array([DEADLY, 1, 2], dtype=np.uint32)
        with pytest.raises(TeacherFailed, match="two engines were lost while they scored these rows"):
            await pool.score([deadly], Fields(k=4))
        await pool.score(rows(5), Fields(k=4))
        assert len(engines) == 3


async def test_who_was_beside_rows_that_kill_engines_is_answered_and_only_they_are_blamed() -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(opened=engines.append), PATIENT) as pool:
        deadly = np.array([DEADLY, 1, 2], dtype=np.uint32)
        killer = asyncio.create_task(pool.score([deadly], Fields(k=4)))
        others = [asyncio.create_task(pool.score(rows(5), Fields(k=4))) for _ in range(3)]
        await eventually(lambda: len(engines) == 2)
        late = asyncio.create_task(pool.score(rows(5), Fields(k=4)))
        with pytest.raises(TeacherFailed, match="the second one with no other call"):
            await killer
        assert [len(await call) for call in (*others, late)] == [1] * 4
        assert len(engines) == 3


async def test_an_engine_is_not_wedged_while_it_answers_or_has_nothing_to_do() -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(tokens_per_second=30.0, opened=engines.append), QUICK) as pool:
        begin = time.monotonic()
        calls = [pool.score(rows(20), Fields(k=4)) for _ in range(6)]
        await asyncio.gather(*calls)
        assert time.monotonic() - begin > 2 * QUICK.wedged_seconds
        await asyncio.sleep(1.5 * QUICK.wedged_seconds)
        await pool.score(rows(5), Fields(k=4))
        assert len(engines) == 1


async def test_a_teacher_without_an_engine_of_ours_may_take_its_time() -> None:
    slow = FakeTeacher(tokens_per_second=10.0)
    assert not isinstance(slow, Watched)
    async with LocalPool.open(opens(slow), QUICK) as pool:
        assert len(await pool.score(rows(10), Fields(k=4))) == 1


async def test_a_caller_that_leaves_takes_nobody_with_it() -> None:
    async with LocalPool.open(opens_process_teacher(tokens_per_second=100.0), PATIENT) as pool:
        leaving = asyncio.create_task(pool.score(rows(10), Fields(k=4)))
        staying = asyncio.create_task(pool.score(rows(12), Fields(k=4)))
        await eventually(lambda: pool.status.each[0].tokens_waiting == 22)
        leaving.cancel()
        await eventually(lambda: pool.status.each[0].tokens_waiting == 12)
        assert len(await staying) == 1


async def leave(pool: LocalPool, seconds: float) -> None:
    """Ask, and give up after so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await pool.score(rows(10), Fields(k=4))


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_callers_that_give_up_early_do_not_hide_a_wedged_engine(pause: float) -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(opened=engines.append), QUICK) as pool:
        await pool.score(rows(5), Fields(k=4))
        os.kill(engines[0].pid, signal.SIGSTOP)
        for _ in range(40):
            await leave(pool, QUICK.wedged_seconds / 5)
            await asyncio.sleep(pause)
            if len(engines) > 1:
                break
        assert not is_running(engines[0].pid)
        await pool.score(rows(5), Fields(k=4))
        assert len(engines) == 2


async def test_an_engine_that_rests_after_a_caller_left_is_not_wedged() -> None:
    engines: list[ProcessTeacher] = []
    async with LocalPool.open(opens_process_teacher(tokens_per_second=100.0, opened=engines.append), QUICK) as pool:
        await leave(pool, 0.02)
        await asyncio.sleep(2 * QUICK.wedged_seconds)
        await pool.score(rows(20), Fields(k=4))
        assert len(engines) == 1


class Stuck(FakeTeacher):
    """Its engine never makes a step."""

    failure = ""
    progress = 0


def test_refused_and_abandoned_calls_are_no_sign_of_life_but_answers_and_failures_are() -> None:
    def ask(health: EngineHealth, outcome: BaseException | None) -> None:
        with health.call(10):
            time.sleep(0.02)
            if outcome is not None:
                raise outcome

    for outcome, stuck in ((InvalidInput("k"), True), (asyncio.CancelledError(), True), (TeacherFailed("NaN"), False)):
        health = EngineHealth(Stuck(), wedged_seconds=0.01)
        with pytest.raises(type(outcome)):
            ask(health, outcome)
        assert bool(health.trouble()) == stuck
    health = EngineHealth(Stuck(), wedged_seconds=0.01)
    ask(health, None)
    assert not health.trouble()


@asynccontextmanager
async def hanging(engines: list[ProcessTeacher], patient: asyncio.Event | None) -> AsyncIterator[Teacher]:
    """A real engine, and after it none: the start hangs; with `patient`, also when it is given up."""
    if not engines:
        async with opens_process_teacher(opened=engines.append)() as teacher:
            yield teacher
        return
    engines.append(engines[0])
    try:
        await asyncio.Event().wait()
    finally:
        if patient is not None:
            await patient.wait()


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_start_that_hangs_keeps_nobody_from_stopping(stubborn: bool, caplog: pytest.LogCaptureFixture) -> None:
    engines: list[ProcessTeacher] = []
    patient = asyncio.Event() if stubborn else None
    watch = Watch(check_seconds=0.02, close_seconds=0.1)
    hosted = HostedTeacher(
        "smol",
        partial(hanging, engines, patient),
        open_pool=lambda open_teacher: LocalPool.open(open_teacher, watch),
    )
    hosted.start()
    await hosted.settled()
    os.kill(engines[0].pid, signal.SIGKILL)
    await eventually(lambda: len(engines) == 2)
    waiting = asyncio.create_task(hosted.front(store=True).score(rows(5), Fields(k=4)))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await hosted.drain(no_engine_seconds=0.1)
        await hosted.stop()
    with pytest.raises(Unavailable, match="closed"):
        await waiting
    assert ("is left behind" in caplog.text) == stubborn
    if patient is not None:
        patient.set()
        await eventually(lambda: "engine keeper" not in {task.get_name() for task in asyncio.all_tasks()})


def breaking(engines: list[ProcessTeacher], broken: list[Exception]) -> OpenTeacher:
    """Opens a real engine while `broken` is empty, else raises what is in there."""

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Teacher]:
        if broken:
            raise broken[0]
        async with opens_process_teacher(opened=engines.append)() as teacher:
            yield teacher

    return open_it


async def test_starts_that_fail_again_and_again_are_a_failed_teacher_until_one_works() -> None:
    engines: list[ProcessTeacher] = []
    broken: list[Exception] = []
    async with LocalPool.open(breaking(engines, broken), PATIENT) as pool:
        broken.append(OSError("no memory left"))
        os.kill(engines[0].pid, signal.SIGKILL)
        await eventually(lambda: pool.state == "failed")
        assert pool.failure == "OSError: no memory left"
        assert pool.status.replicas == 0
        with pytest.raises(TeacherFailed, match="does not start any more: OSError: no memory left"):
            await pool.score(rows(5), Fields(k=4))
        broken.clear()
        await eventually(lambda: pool.state == "ready")
        assert len(await pool.score(rows(5), Fields(k=4))) == 1


async def test_the_first_start_is_tried_once() -> None:
    broken: list[Exception] = [InvalidInput("no such model")]
    with pytest.raises(InvalidInput, match="no such model"):
        async with LocalPool.open(breaking([], broken), PATIENT):
            pytest.fail("it opened")


async def test_another_model_under_the_same_name_is_not_taken_for_the_teacher() -> None:
    teachers = [FakeTeacher(), FakeTeacher(fake_identity(model="other"))]

    class Dying(FakeTeacher):
        failure = ""
        progress = 0

    first = Dying()
    teachers[0] = first

    @asynccontextmanager
    async def open_next() -> AsyncIterator[Teacher]:
        yield teachers[0]

    async with LocalPool.open(open_next, PATIENT) as pool:
        teachers.pop(0)
        first.failure = "it ended"
        await eventually(lambda: pool.state == "failed")
        assert "another one: weights_sha256: '" in pool.failure


async def test_what_is_kept_is_answered_while_there_is_no_engine(tmp_path: Path) -> None:
    engines: list[ProcessTeacher] = []
    broken: list[Exception] = []
    keep = Keep(Cache.open(tmp_path / "cache", mode="r+"), KeepPolicy(k=8))
    hosted = HostedTeacher(
        "smol",
        breaking(engines, broken),
        keep,
        open_pool=lambda open_teacher: LocalPool.open(open_teacher, PATIENT),
    )
    hosted.start()
    await hosted.settled()
    known, new = rows(9), rows(11)
    await hosted.front(store=True).score(known, Fields(k=4))
    broken.append(OSError("no memory left"))
    os.kill(engines[0].pid, signal.SIGKILL)
    await eventually(lambda: hosted.state == "failed")
    assert hosted.failure == "OSError: no memory left"
    assert len(await hosted.front(store=True).score(known, Fields(k=4))) == 1
    with pytest.raises(TeacherFailed):
        await hosted.front(store=True).score(new, Fields(k=4))
    await hosted.stop()


async def test_calls_that_wait_for_an_engine_end_with_the_pool() -> None:
    engines: list[ProcessTeacher] = []
    broken: list[Exception] = []
    patient = Watch(check_seconds=0.02, pause_seconds=60.0)
    async with LocalPool.open(breaking(engines, broken), patient) as pool:
        broken.append(OSError("no memory left"))
        os.kill(engines[0].pid, signal.SIGKILL)
        await eventually(lambda: pool.failure.startswith("OSError"))
        waiting = asyncio.create_task(pool.score(rows(5), Fields(k=4)))
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="closed"):
        await waiting


async def test_there_is_exactly_one() -> None:
    async with LocalPool.open(opens(FakeTeacher())) as pool:
        assert (await pool.scale(1)).replicas == 1
        assert (await pool.autoscale(None)).target == 1
        with pytest.raises(LimitExceeded, match="more replicas need Ray"):
            await pool.scale(2)
        with pytest.raises(LimitExceeded, match="more replicas need Ray"):
            await pool.autoscale(AutoscaleSettings(max=3, tokens_per_replica=100))


async def test_a_drained_teacher_takes_no_more_calls_and_lets_those_in_flight_end() -> None:
    hosted = HostedTeacher("smol", opens(FakeTeacher(tokens_per_second=100.0)))
    hosted.start()
    await hosted.settled()
    call = asyncio.create_task(hosted.front(store=True).score(rows(20), Fields(k=4)))
    await asyncio.sleep(0)
    draining = asyncio.create_task(hosted.drain())
    await eventually(lambda: hosted.state == "draining")
    with pytest.raises(Unavailable, match="being removed"):
        hosted.front(store=True)
    await draining
    assert call.done()
    assert len(await call) == 1
    await hosted.stop()
