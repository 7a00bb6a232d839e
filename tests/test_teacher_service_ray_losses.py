"""What a pool on Ray does when replicas are lost or scaled, in the order of events that a real cluster seldom shows.

Serve's handle and application are stand-ins with set answers; tests/test_teacher_service_ray_pool.py has real ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from cache import Fields, Targets
from cache.errors import InvalidInput, PotstillError, TeacherFailed, Unavailable
from teacher_service.ray_pool import RayPool
from teacher_service.ray_replica import Described, Refused, ScoreCall, Scored
from teacher_service.ray_serve import ServeApp, ServeView
from teacher_service.replica_settings import AutoscaleSettings, RaySettings, ReplicaSettings
from tests.contracts import rows
from tests.fakes import FakeTeacher
from tests.waiting import eventually

QUICK = RaySettings(health_seconds=0.1, health_timeout_seconds=0.2)
DEAD = Refused("teacher_failed", "the engine ended", elsewhere=True)


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
