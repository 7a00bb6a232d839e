"""What a pool on Ray does when replicas are lost or scaled, in the order of events that a real cluster seldom shows.

Serve's handle and application are stand-ins with set answers; tests/test_teacher_service_ray_pool.py has real ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from cache import Fields, Targets
from cache.errors import InvalidInput, PotstillError, TeacherFailed, Unavailable
from teacher_service.ray_losses import has_crashed, lost
from teacher_service.ray_pool import RayPool
from teacher_service.ray_replica import Described, Refused, Replica, ScoreCall, Scored
from teacher_service.ray_serve import ServeApp, ServeView
from teacher_service.replica_settings import AutoscaleSettings, RaySettings, ReplicaSettings
from tests.contracts import rows
from tests.fakes import FakeTeacher
from tests.process_teacher import DEADLY, ProcessTeacher, opens_process_teacher
from tests.waiting import eventually

QUICK = RaySettings(health_seconds=0.1, health_timeout_seconds=0.2)
DEAD = Refused("teacher_failed", "the engine ended", elsewhere=True)
CRASHED = Refused("teacher_failed", "the engine ended", elsewhere=True, crashed=True)


@dataclass(frozen=True)
class Chosen:
    replica_id: str


class Handle:
    """Of a deployment whose replicas answer what `outcome` says."""

    def __init__(self, outcome: Callable[[str], Refused | None]) -> None:
        self.asked: list[str] = []
        self._outcome = outcome

    @asynccontextmanager
    async def choose_replica(self, ranking: list[str]) -> AsyncIterator[Chosen]:
        yield Chosen(ranking[0])

    def dispatch(self, chosen: Chosen, call: ScoreCall) -> Awaitable[Scored | Refused]:
        self.asked.append(chosen.replica_id)
        return asyncio.ensure_future(self._answer(chosen, call))

    async def _answer(self, chosen: Chosen, call: ScoreCall) -> Scored | Refused:
        refused = self._outcome(chosen.replica_id)
        return refused or Scored(Targets.concat(await FakeTeacher().score(call.rows, call.want)))


def pool_of(handle: Handle, *replicas: str) -> RayPool:
    pool = RayPool("smol", ServeApp("smol", QUICK), ReplicaSettings(), QUICK)
    fake = FakeTeacher()
    pool._score, pool._described = handle, Described(fake.identity, fake.provenance, fake.limits)
    see(pool, *replicas)
    return pool


def see(pool: RayPool, *replicas: str) -> None:
    """What Serve says is ready."""
    pool._view = ServeView("RUNNING", "", len(replicas), dict.fromkeys(replicas, "ready"))


async def test_a_call_waits_for_the_replica_that_takes_the_place_of_the_only_one() -> None:
    handle = Handle(lambda name: DEAD if name == "old" else None)
    pool = pool_of(handle, "old")
    asked = rows(9)
    call = asyncio.create_task(pool.score(asked, Fields(k=4)))
    await eventually(lambda: handle.asked == ["old"])
    see(pool)
    await asyncio.sleep(0.2)
    see(pool, "new")
    (answer,) = await call
    np.testing.assert_array_equal(answer.ids, FakeTeacher().distribution(asked[0], 4).ids)
    assert handle.asked == ["old", "new"]


@pytest.mark.parametrize("stays", [True, False])
async def test_a_replica_that_is_not_replaced_in_time_is_an_error_to_retry(stays: bool) -> None:
    handle = Handle(lambda _: DEAD)
    pool = pool_of(handle, "only")
    call = asyncio.create_task(pool.score(rows(9), Fields(k=4)))
    await eventually(lambda: handle.asked == ["only"])
    if not stays:
        see(pool)
    with pytest.raises(Unavailable, match="1 replicas of teacher 'smol' were lost .* the engine ended; retry"):
        await call


async def test_a_call_does_not_cost_replicas_without_end() -> None:
    handle = Handle(lambda _: DEAD)
    with pytest.raises(Unavailable, match="5 replicas"):
        await pool_of(handle, *"abcdefg").score(rows(9), Fields(k=4))
    assert len(handle.asked) == 5


async def test_rows_that_crash_one_replica_after_the_other_are_not_to_be_tried_again() -> None:
    handle = Handle(lambda _: CRASHED)
    crashed = "3 replicas of teacher 'smol' crashed while they scored these 2 rows of 16 tokens, .* the engine ended;"
    with pytest.raises(TeacherFailed, match=crashed) as failure:
        await pool_of(handle, *"abcdefg").score(rows(9, 7), Fields(k=4))
    assert not failure.value.retryable
    assert handle.asked == ["a", "b", "c"]


async def test_a_crash_or_two_among_replicas_that_were_stopped_is_not_the_rows_fault() -> None:
    handle = Handle(lambda name: CRASHED if name in "bd" else DEAD)
    with pytest.raises(Unavailable, match="5 replicas") as failure:
        await pool_of(handle, *"abcdefg").score(rows(9), Fields(k=4))
    assert failure.value.retryable
    assert len(handle.asked) == 5


class Undeployed(Replica):
    """Without Serve, which awaits `__del__`."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@asynccontextmanager
async def replica_of(engines: list[ProcessTeacher], *, wedged_seconds: float) -> AsyncIterator[Replica]:
    replica = Undeployed.__new__(Undeployed)
    await replica.__init__(opens_process_teacher(opened=engines.append), wedged_seconds)  # type: ignore[misc]
    try:
        yield replica
    finally:
        await (replica._closing or replica._stack.aclose())


async def test_a_replica_knows_whether_its_engine_died_of_the_call_or_was_dead_before() -> None:
    async with replica_of([], wedged_seconds=60.0) as replica:
        identity = replica.describe().identity
        call = ScoreCall.of(rows(9), Fields(k=4), identity)
        assert isinstance(await replica.score(call), Scored)
        deadly = ScoreCall.of([np.array([DEADLY, 1], np.uint32)], Fields(k=4), identity)
        died = await replica.score(deadly)
        assert isinstance(died, Refused)
        assert (died.kind, died.elsewhere, died.crashed) == ("teacher_failed", True, True)
        late = await replica.score(call)
        assert isinstance(late, Refused)
        assert (late.elsewhere, late.crashed) == (True, False)


async def test_a_replica_whose_engine_is_wedged_has_not_crashed() -> None:
    engines: list[ProcessTeacher] = []
    async with replica_of(engines, wedged_seconds=0.2) as replica:
        os.kill(engines[0].pid, signal.SIGSTOP)
        call = asyncio.create_task(replica.score(ScoreCall.of(rows(9), Fields(k=4), replica.describe().identity)))
        await eventually(lambda: bool(replica._trouble))
        with pytest.raises(RuntimeError, match="wedged"):
            await replica.check_health()
        outcome = await call
    assert isinstance(outcome, Refused)
    assert (outcome.elsewhere, outcome.crashed) == (True, False)


class Victim:
    """A replica's process, as far as Ray is concerned."""

    def pid(self) -> int:
        return os.getpid()

    def wait(self) -> None:
        time.sleep(60)


@pytest.mark.usefixtures("ray_mark")
def test_ray_says_whether_a_process_ended_by_itself_or_was_stopped() -> None:
    def loss(stop: Callable[[Any], object]) -> RayActorError:
        victim: Any = ray.remote(num_cpus=0)(Victim).remote()
        pid = ray.get(victim.pid.remote())
        waiting = victim.wait.remote()
        stop((victim, pid))
        with pytest.raises(RayActorError) as error:
            ray.get(waiting, timeout=120)
        return error.value

    by_itself = loss(lambda it: os.kill(it[1], signal.SIGSEGV))
    assert has_crashed(by_itself)
    stopped = loss(lambda it: ray.kill(it[0]))
    assert not has_crashed(stopped)
    assert lost("r1", by_itself, had_call=True).crashed
    assert not lost("r1", by_itself, had_call=False).crashed
    assert not has_crashed(ActorUnavailableError("the network is slow", None))


@pytest.mark.parametrize("error", [TeacherFailed("the logits of row 0 are NaN"), InvalidInput("no such field")])
async def test_an_error_about_the_rows_is_told_at_once(error: PotstillError) -> None:
    handle = Handle(lambda _: Refused(error.kind, error.detail, elsewhere=False))
    with pytest.raises(type(error), match=str(error)):
        await pool_of(handle, "a", "b").score(rows(9), Fields(k=4))
    assert len(handle.asked) == 1


class SlowApp(ServeApp):
    """Serve takes its time for the first change of the number."""

    def __init__(self) -> None:
        super().__init__("smol", QUICK)
        self.number = 1
        self.begun = threading.Event()
        self.go = threading.Event()

    def scale(self, replicas: int) -> None:
        self.begun.set()
        self.go.wait(20)
        self.number = replicas

    def look(self) -> ServeView:
        return ServeView("RUNNING", "", self.number, {f"r{i}": "ready" for i in range(self.number)})


async def test_the_number_that_an_admin_sets_outlives_a_step_of_autoscaling_under_way() -> None:
    app = SlowApp()
    pool = RayPool(
        "smol", app, ReplicaSettings(autoscale=AutoscaleSettings(max=5, tokens_per_replica=10, up_seconds=0))
    )
    pool.follow_queue(lambda: 1000)
    step = asyncio.create_task(pool._follow_need())
    await eventually(app.begun.is_set)

    async def set_two() -> None:
        await pool.autoscale(None)
        assert (await pool.scale(2)).target == 2

    admin = asyncio.create_task(set_two())
    late = asyncio.create_task(pool._follow_need())
    await asyncio.sleep(0.05)
    app.go.set()
    await asyncio.gather(step, admin, late)
    assert (app.number, pool.status.target, pool.status.replicas) == (2, 2, 2)
