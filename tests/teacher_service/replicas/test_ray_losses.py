"""What a pool on Ray does when replicas are lost or scaled, in the order of events that a real cluster seldom shows.

Serve's handle and application are stand-ins with set answers; test_ray_pool.py has real ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from potstill.cache import Fields, Targets
from potstill.cache.errors import InvalidInput, PotstillError, TeacherFailed, Unavailable
from potstill.teacher_service.replicas.ray_losses import Losses, has_crashed, lost
from potstill.teacher_service.replicas.ray_pool import RayPool
from potstill.teacher_service.replicas.ray_replica import Refused, Replica, ScoreCall
from potstill.teacher_service.replicas.ray_serve import ServeApp, ServeView
from potstill.teacher_service.settings.replicas import RaySettings, ReplicaSettings
from tests.support.contracts import rows
from tests.support.fakes import FakeTeacher
from tests.support.processes.process_teacher import DEADLY, ProcessTeacher, opens_process_teacher
from tests.support.waiting import eventually

QUICK = RaySettings(health_seconds=0.1, health_timeout_seconds=0.2)
PATIENT = RaySettings()
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

    def dispatch(self, chosen: Chosen, call: ScoreCall) -> Awaitable[Targets | Refused]:
        self.asked.append(chosen.replica_id)
        return asyncio.ensure_future(self._answer(chosen, call))

    async def _answer(self, chosen: Chosen, call: ScoreCall) -> Targets | Refused:
        refused = self._outcome(chosen.replica_id)
        return refused or Targets.concat(await FakeTeacher().score(call.rows, call.want))


def pool_of(handle: Handle, *replicas: str, settings: RaySettings = QUICK) -> RayPool:
    pool = RayPool("smol", ServeApp("smol", settings), ReplicaSettings(), settings)
    fake = FakeTeacher()
    pool._score = handle
    pool.identity, pool.provenance, pool.limits = fake.identity, fake.provenance, fake.limits
    see(pool, *replicas)
    return pool


def see(pool: RayPool, *replicas: str) -> None:
    """What Serve says is ready."""
    pool._view = ServeView("RUNNING", "", dict.fromkeys(replicas, "ready"))


async def test_a_call_waits_for_the_replica_that_takes_the_place_of_the_only_one() -> None:
    handle = Handle(lambda name: DEAD if name == "old" else None)
    pool = pool_of(handle, "old", settings=PATIENT)
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


class SlowButWell(Handle):
    """Replica `a` crashes with all that it has; the others take a fifth of a second for each call."""

    async def _answer(self, chosen: Chosen, call: ScoreCall) -> Targets | Refused:
        if chosen.replica_id == "a":
            await asyncio.sleep(0.1)
            return CRASHED
        await asyncio.sleep(0.2)
        return await Handle._answer(self, chosen, call)


async def test_calls_that_are_tried_alone_one_after_the_other_are_all_answered() -> None:
    """However long the last of them waits for the others: a replica is there all the time."""
    handle = SlowButWell(lambda _: None)
    pool = pool_of(handle, "a")
    num_calls = int(3 * pool._patience_seconds / 0.2)
    calls = [asyncio.create_task(pool.score(rows(9 + i), Fields(k=4))) for i in range(num_calls)]
    await eventually(lambda: len(handle.asked) == num_calls)
    see(pool, "a", "b")
    answers = await asyncio.gather(*calls)
    assert [len(answer) for answer in answers] == [1] * num_calls


async def test_a_call_does_not_cost_replicas_without_end() -> None:
    handle = Handle(lambda _: DEAD)
    with pytest.raises(Unavailable, match="5 replicas"):
        await pool_of(handle, *"abcdefg").score(rows(9), Fields(k=4))
    assert len(handle.asked) == 5


async def test_rows_that_crash_one_replica_after_the_other_are_not_to_be_tried_again() -> None:
    handle = Handle(lambda _: CRASHED)
    crashed = "3 replicas of teacher 'smol' crashed while they scored 2 rows of 16 tokens, .* the engine ended;"
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


def test_crashes_in_company_are_not_the_rows_fault_however_many() -> None:
    call = ScoreCall.of(rows(9), Fields(k=4), FakeTeacher().identity)
    losses = Losses()
    for name in "abcd":
        losses.add(name, CRASHED, alone=name == "d")
        assert not losses.enough
    losses.add("e", DEAD, alone=True)
    assert losses.enough
    assert isinstance(losses.error("smol", call, CRASHED), Unavailable)
    losses.add("f", CRASHED, alone=True)
    assert isinstance(losses.error("smol", call, CRASHED), TeacherFailed)


POISON = 3


class Poisoned(Handle):
    """Of a pool whose `r0` is replaced by `r1`, and so on: a call of `POISON` tokens kills its replica and all with it.

    Args:
        held: replicas that neither answer nor die before their gate is opened.
        spares: what is ready too once one died.
        unseen: replicas whose death Serve does not know of at once.
    """

    def __init__(self, *held: str, spares: Sequence[str] = (), unseen: str = "") -> None:
        super().__init__(lambda _: None)
        self.calls: list[tuple[str, int]] = []
        self.gates = {name: asyncio.Event() for name in held}
        self.pool = pool_of(self, "r0")
        self._spares = spares
        self._unseen = unseen

    async def _answer(self, chosen: Chosen, call: ScoreCall) -> Targets | Refused:
        name, size = chosen.replica_id, len(call.tokens)
        self.calls.append((name, size))
        if name in self.gates:
            await self.gates[name].wait()
        if (name, POISON) not in self.calls:
            return await super()._answer(chosen, call)
        if name != self._unseen:
            see(self.pool, f"r{int(name[1:]) + 1}", *self._spares)
        return CRASHED

    def score(self, num_tokens: int) -> asyncio.Task[list[Targets]]:
        return asyncio.create_task(self.pool.score(rows(num_tokens), Fields(k=4)))


async def test_who_shares_a_replica_with_rows_that_kill_it_is_answered_and_only_they_are_blamed() -> None:
    handle = Poisoned("r0")
    poison, *others = (handle.score(size) for size in (POISON, 9, 11))
    await eventually(lambda: len(handle.calls) == 3)
    handle.gates["r0"].set()
    with pytest.raises(TeacherFailed, match=r"3 replicas .* 1 row of 3 tokens, 2 of them with no other call"):
        await poison
    assert [len(await other) for other in others] == [1, 1]
    assert [name for name, size in handle.calls if size == POISON] == ["r0", "r1", "r2"]
    for other in (9, 11):
        first, again = (name for name, size in handle.calls if size == other)
        assert first == "r0"
        assert again != "r1"


async def test_a_suspect_that_waits_for_another_does_not_run_out_of_patience() -> None:
    handle = Poisoned("r0", "r1")
    poison, other = handle.score(POISON), handle.score(9)
    await eventually(lambda: len(handle.calls) == 2)
    handle.gates["r0"].set()
    await eventually(lambda: handle.calls[2:] == [("r1", POISON)])
    over = time.monotonic() + handle.pool._patience_seconds
    await eventually(lambda: time.monotonic() > over)
    handle.gates["r1"].set()
    assert len(await other) == 1
    with pytest.raises(TeacherFailed):
        await poison


async def test_a_call_without_a_crash_waits_while_a_suspect_has_the_only_replica() -> None:
    handle = Poisoned("r1")
    poison = handle.score(POISON)
    await eventually(lambda: handle.calls == [("r0", POISON), ("r1", POISON)])
    newcomer = handle.score(9)
    await asyncio.sleep(0)  # its first step, which would take it to a free replica
    handle.gates["r1"].set()
    assert len(await newcomer) == 1
    with pytest.raises(TeacherFailed):
        await poison
    (name,) = (name for name, size in handle.calls if size == 9)
    assert name != "r1"


async def test_a_suspect_waits_for_the_calls_that_its_replica_has() -> None:
    handle = Poisoned("r1")
    see(handle.pool, "r0", "r1")
    poison, other = handle.score(POISON), handle.score(9)
    await eventually(lambda: handle.pool._reserved == "r1")
    handle.gates["r1"].set()
    assert len(await other) == 1
    with pytest.raises(TeacherFailed):
        await poison
    assert handle.calls == [("r0", POISON), ("r1", 9), ("r1", POISON), ("r2", POISON)]


async def test_the_replica_with_the_fewest_tokens_in_flight_is_next() -> None:
    handle = Poisoned("r0", "r1", "r2")
    see(handle.pool, "r0", "r1", "r2")
    calls: list[asyncio.Task[list[Targets]]] = []
    for size in (30, 10, 20, 5, 9):
        calls.append(handle.score(size))
        await eventually(lambda: len(handle.calls) == len(calls))
    assert [name for name, _ in handle.calls] == ["r0", "r1", "r2", "r1", "r1"]
    for gate in handle.gates.values():
        gate.set()
    await asyncio.gather(*calls)


async def test_one_suspect_at_a_time_takes_a_replica_from_the_other_calls() -> None:
    handle = Poisoned("r0", "r1", "spare", spares=["spare"])
    poison, other = handle.score(POISON), handle.score(9)
    await eventually(lambda: len(handle.calls) == 2)
    handle.gates["r0"].set()
    await eventually(lambda: handle.calls[2:] == [("r1", POISON)])
    newcomers = [handle.score(20), handle.score(21)]
    await eventually(lambda: handle.calls[3:] == [("spare", 20), ("spare", 21)])
    for gate in handle.gates.values():
        gate.set()
    assert [len(await call) for call in (other, *newcomers)] == [1, 1, 1]
    with pytest.raises(TeacherFailed):
        await poison


async def test_a_crashed_replica_is_not_asked_again_though_serve_still_calls_it_ready() -> None:
    handle = Poisoned("r0", unseen="r1")
    poison, other = handle.score(POISON), handle.score(9)
    await eventually(lambda: len(handle.calls) == 2)
    handle.gates["r0"].set()
    await eventually(lambda: "r1" in handle.pool._in_flight.crashed)
    see(handle.pool, "r1", "r2")
    assert len(await other) == 1
    with pytest.raises(TeacherFailed):
        await poison
    assert [name for name, size in handle.calls if size == 9] == ["r0", "r2"]


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
        assert isinstance(await replica.score(call), Targets)
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
            ray.get(waiting, timeout=300)
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
