"""Replicas on Ray Serve: real ones, really killed and stopped, while calls flow. All tests share one deployment."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from potstill.cache import Fields
from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import InvalidInput, LimitExceeded, TeacherFailed
from potstill.cache.types import JSON, Teacher
from potstill.teacher_service.replicas.ray_pool import RayPool
from potstill.teacher_service.replicas.ray_serve import RayConnection
from potstill.teacher_service.settings.replicas import AutoscaleSettings, RaySettings, ReplicaSettings, ResourceSettings
from tests.conftest import Forward
from tests.support.contracts import FieldsTeacherContract, rows
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.process_teacher import DEADLY, opens_process_teacher
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS_PER_SECOND = 2000.0
# An engine that is stopped is noticed soon; one that a busy machine keeps waiting is neither wedged nor unwell.
SETTINGS = RaySettings(address="auto", wedged_seconds=3.0, health_seconds=0.3, health_timeout_seconds=60.0)
SMALL = ReplicaSettings(max_replicas=3, resources=ResourceSettings(cpus=0))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(ray_mark: str) -> AsyncIterator[RayPool]:
    connection = RayConnection(SETTINGS)
    opens = opens_process_teacher(tokens_per_second=TOKENS_PER_SECOND)
    async with RayPool.open(opens, name="fake", connection=connection, settings=SMALL) as pool:
        yield pool


def engines(mark: str) -> list[int]:
    """The processes of the engines that replicas of this session's Ray have started."""
    return [
        int(folder.name)
        for folder in _processes(mark)
        if b"tests.support.processes.process_teacher" in _command(folder)
    ]


def replicas_of(teacher: str, mark: str) -> list[int]:
    """The processes of a teacher's replicas."""
    title = f"ServeReplica:potstill-{teacher}:".encode()
    return [int(folder.name) for folder in _processes(mark) if title in _command(folder)]


def _command(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""


def _processes(mark: str) -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RAY_OF_THE_TESTS={mark}".encode() in (folder / "environ").read_bytes():
                yield folder
        except OSError:
            continue  # gone meanwhile


async def one_of(processes: Callable[[], list[int]], number: int) -> int:
    """The first, once there are so many: those of replicas that were scaled away are gone."""
    await eventually(lambda: len(processes()) == number)
    return processes()[0]


async def scaled(pool: RayPool, replicas: int) -> None:
    await pool.scale(replicas)
    await settled(pool, replicas)


async def settled(pool: RayPool, replicas: int, seconds: float = 300) -> None:
    await eventually(lambda: [info.state for info in pool.status.each] == ["ready"] * replicas, seconds)


class Traffic:
    """Calls that never pause, each checked against what the model means."""

    def __init__(self, pool: Teacher) -> None:
        self._pool = pool
        self._stopping = False
        self.answered = 0

    async def run(self) -> None:
        while not self._stopping:
            asked = rows(20 + self.answered % 7, 30)
            answers = await self._pool.score(asked, Fields(k=4))
            for row, answer in zip(asked, answers, strict=True):
                np.testing.assert_array_equal(answer.ids, FakeTeacher().distribution(row, 4).ids)
            self.answered += 1

    def stop(self) -> None:
        self._stopping = True


@asynccontextmanager
async def traffic(pool: Teacher, callers: int) -> AsyncIterator[Traffic]:
    """So many callers for the length of the block; the first call that fails ends the test."""
    flowing = Traffic(pool)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(flowing.run())
        yield flowing
        flowing.stop()


class TestRayPool(FieldsTeacherContract):
    @pytest.fixture
    def teacher(self, pool: RayPool) -> Teacher:
        return pool


async def test_a_caller_that_leaves_takes_nobody_with_it(pool: RayPool) -> None:
    leaving = asyncio.create_task(pool.score(rows(3000), Fields(k=4)))
    staying = asyncio.create_task(pool.score(rows(40), Fields(k=4)))
    await eventually(lambda: sum(info.tokens_waiting for info in pool.status.each) == 3040)
    leaving.cancel()
    await eventually(lambda: sum(info.tokens_waiting for info in pool.status.each) == 40)
    assert len(await staying) == 1


async def test_scaling_up_and_down_under_load_fails_no_call(pool: RayPool) -> None:
    await settled(pool, 1)
    (first,) = (info.name for info in pool.status.each)
    async with traffic(pool, callers=12) as flowing:
        await scaled(pool, 2)
        assert first in {info.name for info in pool.status.each}
        before = {info.name: info.tokens_scored for info in pool.status.each}
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 60)
        await eventually(lambda: all(info.tokens_scored > before[info.name] for info in pool.status.each))
        await scaled(pool, 1)
    assert flowing.answered > 60


async def test_a_replica_that_is_scaled_away_finishes_its_calls_first(
    pool: RayPool, caplog: pytest.LogCaptureFixture
) -> None:
    await scaled(pool, 2)
    calls = [asyncio.create_task(pool.score(rows(250, 250), Fields(k=4))) for _ in range(40)]
    await eventually(lambda: min(info.tokens_waiting for info in pool.status.each) > 0)
    await pool.scale(1)
    await eventually(lambda: "draining" in {info.state for info in pool.status.each})
    assert [len(await call) for call in calls] == [2] * 40
    await settled(pool, 1)
    assert "was lost" not in caplog.text


async def test_a_killed_replica_costs_no_call(pool: RayPool, ray_mark: str) -> None:
    await scaled(pool, 2)
    old = {info.name for info in pool.status.each}
    victim = await one_of(partial(replicas_of, "fake", ray_mark), 2)
    async with traffic(pool, callers=8) as flowing:
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: {info.name for info in pool.status.each} != old)
        await settled(pool, 2)
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
    assert flowing.answered > sent + 16


@pytest.mark.slow
async def test_a_wedged_engine_is_replaced_and_its_rows_are_answered(pool: RayPool, ray_mark: str) -> None:
    await scaled(pool, 2)
    old = {info.name for info in pool.status.each}
    stuck = await one_of(partial(engines, ray_mark), 2)
    async with traffic(pool, callers=8) as flowing:
        os.kill(stuck, signal.SIGSTOP)
        await eventually(lambda: stuck not in engines(ray_mark))
        await eventually(lambda: {info.name for info in pool.status.each} != old)
        await settled(pool, 2)
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
    assert stuck not in engines(ray_mark)
    assert flowing.answered > sent + 16


@pytest.mark.slow
async def test_calls_outlive_the_engine_of_the_only_replica(pool: RayPool, ray_mark: str) -> None:
    await scaled(pool, 1)
    (old,) = (info.name for info in pool.status.each)
    engine = await one_of(partial(engines, ray_mark), 1)
    async with traffic(pool, callers=4) as flowing:
        os.kill(engine, signal.SIGKILL)
        await eventually(lambda: [info.name for info in pool.status.each if info.state == "ready"] not in ([], [old]))
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
    assert flowing.answered > sent + 16


@pytest.mark.slow
async def test_a_dead_engine_is_replaced_though_its_replica_lives(pool: RayPool, ray_mark: str) -> None:
    await scaled(pool, 2)
    old = {info.name for info in pool.status.each}
    engine = await one_of(partial(engines, ray_mark), 2)
    async with traffic(pool, callers=8) as flowing:
        os.kill(engine, signal.SIGKILL)
        await eventually(lambda: {info.name for info in pool.status.each} != old)
        await settled(pool, 2)
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
    assert flowing.answered > sent + 16


@pytest.mark.slow
async def test_rows_that_kill_engines_cost_three_replicas_and_no_call_of_others(pool: RayPool) -> None:
    await scaled(pool, 1)
    deadly = np.array([DEADLY, 1, 2], np.uint32)
    async with traffic(pool, callers=6) as flowing:
        await eventually(lambda: flowing.answered > 6)
        with pytest.raises(
            TeacherFailed, match="3 replicas of teacher 'fake' crashed while .* 1 row of 3 tokens, 2 of"
        ):
            await pool.score([deadly], Fields(k=4))
        sent = flowing.answered
        await eventually(lambda: flowing.answered > sent + 16)
    await settled(pool, 1)
    assert (await pool.score(rows(9), Fields(k=4)))[0].num_positions == 9


async def test_more_replicas_than_allowed_are_refused(pool: RayPool) -> None:
    with pytest.raises(LimitExceeded, match=r"4 replicas were asked for, but teacher 'fake' has 1 to max_replicas=3"):
        await pool.scale(4)


async def test_autoscaling_follows_the_tokens_that_wait(pool: RayPool) -> None:
    await scaled(pool, 1)
    limits = AutoscaleSettings(min=1, max=2, tokens_per_replica=200, up_seconds=0.0, down_seconds=2.0)
    with pytest.raises(LimitExceeded, match=r"autoscale.max=9 is over max_replicas=3"):
        await pool.autoscale(AutoscaleSettings(max=9, tokens_per_replica=200))
    status = await pool.autoscale(limits)
    assert (status.min, status.max) == (1, 2)
    with pytest.raises(InvalidInput, match="autoscaled between 1 and 2 replicas"):
        await pool.scale(2)
    async with traffic(pool, callers=12) as flowing:
        await settled(pool, 2)
    assert flowing.answered > 0
    await settled(pool, 1)
    status = await pool.autoscale(None)
    assert (status.target, status.min, status.max) == (1, 1, 3)


@asynccontextmanager
async def open_changing(marks: Path) -> AsyncIterator[Teacher]:
    """A teacher whose model is another one each time that it is opened."""
    number = len(list(marks.iterdir()))
    (marks / f"{number}").touch()
    yield FakeTeacher(fake_identity(model=f"model-{number}"))


@pytest.mark.slow
async def test_a_replica_that_is_another_teacher_answers_nobody(ray_mark: str, tmp_path: Path) -> None:
    opens = partial(open_changing, tmp_path)
    async with RayPool.open(opens, name="odd", connection=RayConnection(SETTINGS), settings=SMALL) as pool:
        assert pool.identity.model == "model-0"
        (first,) = (info.name for info in pool.status.each)
        async with traffic(pool, callers=4) as flowing:
            await pool.scale(2)
            await eventually(lambda: len(list(tmp_path.iterdir())) >= 3)
            sent = flowing.answered
            await eventually(lambda: flowing.answered > sent + 20)
        assert [info.name for info in pool.status.each if info.tokens_scored] == [first]


@asynccontextmanager
async def open_nothing() -> AsyncIterator[Teacher]:
    raise InvalidInput("there is no model folder 'nowhere'")
    yield FakeTeacher()


@pytest.mark.slow
async def test_a_teacher_that_does_not_start_says_why(ray_mark: str) -> None:
    with pytest.raises(InvalidInput, match="^there is no model folder 'nowhere'$"):
        async with RayPool.open(open_nothing, name="none", connection=RayConnection(SETTINGS), settings=SMALL):
            pytest.fail("it opened")
    async with RayPool.open(opens_process_teacher(), name="none", connection=RayConnection(SETTINGS), settings=SMALL):
        pass


@pytest.mark.slow
async def test_real_engines_as_replicas_survive_a_kill(ray_mark: str, tiny_llama: Path, tiny_forward: Forward) -> None:
    options: dict[str, JSON] = {"dtype": "float32", "max_batch_tokens": 64}
    opens = partial(open_teacher, str(tiny_llama), options=options)
    settings = ReplicaSettings(replicas=2, resources=ResourceSettings(cpus=0))
    patient = RaySettings(address="auto", health_seconds=1.0)
    async with RayPool.open(opens, name="tiny", connection=RayConnection(patient), settings=settings) as pool:
        await settled(pool, 2)
        old = {info.name for info in pool.status.each}
        asked = rows(200, 30, 120, 64)
        calls = [asyncio.create_task(pool.score([row], Fields(k=8))) for row in asked * 8]
        await eventually(lambda: min(info.tokens_waiting for info in pool.status.each) > 0)
        os.kill(await one_of(partial(replicas_of, "tiny", ray_mark), 2), signal.SIGKILL)
        answers = [answer for call in calls for answer in await call]
        for row, answer in zip(asked * 8, answers, strict=True):
            dense = tiny_forward(row)
            np.testing.assert_allclose(
                answer.logprobs, np.take_along_axis(dense, answer.ids.astype(int), axis=1), atol=1e-3
            )
        await eventually(lambda: {info.name for info in pool.status.each} != old)
        await settled(pool, 2)
        assert pool.provenance.engine == "vllm"
