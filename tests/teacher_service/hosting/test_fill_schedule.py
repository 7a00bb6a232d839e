"""How many jobs that fill corpora run at one time, and what becomes of the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache import Cache
from potstill.cache.errors import Overloaded, TeacherFailed
from potstill.teacher_service.hosting.fill_schedule import FillSchedule, FillSlot
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.routes.doctor import admitted_bytes
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.corpora import make_corpus, teacher_for, topics
from tests.support.fakes import MoodyTeacher
from tests.support.fill_requests import BODY, run_fill, until_state
from tests.support.processes.servers import hosted, refused, serving_teachers
from tests.support.waiting import eventually, until

NAMES = ("fake", "b", "c", "d")
ONE_BATCH = {**BODY, "in_flight": 1}
SPENT = "the quota of the day is spent"


class Filled:
    """A service whose teachers each wait at a gate of their own."""

    def __init__(self, folder: Path, running: int) -> None:
        self.cache: Cache = make_corpus(folder, texts=topics(2, characters=300), shard_positions=300)[0]
        corpus = self.cache.corpus("docs")
        self.teachers = {name: MoodyTeacher(teacher_for(corpus)) for name in NAMES}
        for teacher in self.teachers.values():
            teacher.gate.clear()
        self._limits = LimitSettings(max_fills_running=running)
        self.url = ""

    @contextmanager
    def served(self) -> Iterator[Filled]:
        known = [hosted(name, teacher) for name, teacher in self.teachers.items()]
        with serving_teachers(*known, cache=self.cache, limits=self._limits) as self.url:
            yield self

    def address(self, name: str) -> str:
        return f"{self.url}/v1/corpora/docs/fill/{name}"

    def put(self, name: str, body: dict[str, Any] = BODY) -> httpx.Response:
        return http.put(self.address(name), json=body)

    def admitted_bytes(self) -> int:
        return int(http.get(f"{self.url}/v1/doctor").json()["memory"]["admitted_bytes"])

    def states(self) -> dict[str, str]:
        fills = http.get(f"{self.url}/v1/fills").json()["fills"]
        return {job["teacher"]: job["state"] for job in fills}


def test_jobs_over_the_bound_wait_in_the_order_of_asking(tmp_path: Path) -> None:
    with Filled(tmp_path / "c", 1).served() as filled:
        begun = [filled.put(name).json() for name in NAMES[:3]]
        assert [job["state"] for job in begun] == ["running", "waiting", "waiting"]
        assert (begun[1]["seconds"], begun[1]["positions_per_second"]) == (0.0, 0.0)
        assert filled.put("b").json()["state"] == "waiting"
        refused(filled.put("b", {"fields": {"k": 5}}), 409, "already_exists")
        for name, left in zip(NAMES, (("b", "c"), ("c",), ()), strict=False):
            assert [waiting for waiting, state in filled.states().items() if state == "waiting"] == list(left)
            until(lambda name=name: filled.teachers[name].calls > 0)  # type: ignore[misc]
            assert all(filled.teachers[other].calls == 0 for other in left)
            filled.teachers[name].gate.set()
            assert until_state(filled.address(name), "done", "failed")["state"] == "done"
        assert filled.cache.fresh().targets("c", "docs").committed.all()


def test_a_job_that_fails_or_is_stopped_lets_the_next_one_run(tmp_path: Path) -> None:
    with Filled(tmp_path / "c", 2).served() as filled:
        filled.teachers["fake"].errors.append(TeacherFailed("the engine answered NaN"))
        assert [filled.put(name).json()["state"] for name in NAMES] == ["running", "running", "waiting", "waiting"]
        stopped = http.delete(filled.address("c")).json()
        assert (stopped["state"], stopped["seconds"]) == ("stopped", 0.0)
        filled.teachers["fake"].gate.set()
        assert until_state(filled.address("fake"), "done", "failed")["state"] == "failed"
        until(lambda: filled.teachers["d"].calls > 0)
        assert filled.states() == {"fake": "failed", "b": "running", "c": "stopped", "d": "running"}
        # One that is asked for again is the last in the order.
        assert [filled.put(name).json()["state"] for name in ("fake", "c")] == ["waiting", "waiting"]
        assert http.delete(filled.address("b")).json()["state"] == "stopped"
        until(lambda: filled.states()["fake"] == "running")
        assert filled.states()["c"] == "waiting"
        assert filled.teachers["c"].calls == 0


def test_waiting_jobs_end_with_the_service(tmp_path: Path) -> None:
    filled = Filled(tmp_path / "c", 1)
    with filled.served():
        for name in NAMES:
            filled.put(name)
        until(lambda: filled.teachers["fake"].calls > 0)
    assert [filled.teachers[name].calls for name in NAMES[1:]] == [0, 0, 0]


def test_the_command_watches_a_job_that_waits_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Filled(tmp_path / "c", 1).served() as filled:
        filled.put("b")
        assert run_fill(filled.url, "--top-k", "4", "--no-watch") == 0
        assert "fake on docs: waiting" in capsys.readouterr().out
        statuses: list[int] = []
        watching = threading.Thread(target=lambda: statuses.append(run_fill(filled.url, "--top-k", "4")))
        watching.start()
        watching.join(1.0)
        assert watching.is_alive()
        for name in ("b", "fake"):
            filled.teachers[name].gate.set()
        watching.join()
        assert statuses == [0]
        assert "fake on docs: done" in capsys.readouterr().out


def test_jobs_that_are_told_to_come_back_later_let_others_run(tmp_path: Path) -> None:
    with Filled(tmp_path / "c", 2).served() as filled:
        for name in ("fake", "b"):
            filled.teachers[name].errors += [Overloaded(SPENT, retry_after=3600.0)] * 4
        assert [filled.put(name).json()["state"] for name in NAMES] == ["running", "running", "waiting", "waiting"]
        for name in NAMES:
            filled.teachers[name].gate.set()
        for name in ("c", "d"):
            assert until_state(filled.address(name), "done", "failed")["state"] == "done"
        assert filled.states() == {"fake": "waiting", "b": "waiting", "c": "done", "d": "done"}
        at = http.get(filled.address("fake")).json()
        assert at["told_to_wait"] == {"kind": "overloaded", "detail": SPENT}
        stopped = http.delete(filled.address("fake")).json()
        assert (stopped["state"], stopped["told_to_wait"]) == ("stopped", None)
        assert stopped["seconds"] > 0


def test_a_job_that_may_go_on_does_so_while_the_one_that_began_meanwhile_runs(tmp_path: Path) -> None:
    """It may hold what others wait for, in other services too; so what it holds is counted besides."""
    with Filled(tmp_path / "c", 1).served() as filled:
        refused_once = filled.teachers["fake"]
        refused_once.errors.append(Overloaded("busy", retry_after=0.5))
        admitted = filled.admitted_bytes()
        for name in NAMES[:3]:
            filled.put(name, ONE_BATCH)
        until(lambda: refused_once.calls == 1)
        refused_once.gate.set()
        until(lambda: filled.teachers["b"].calls > 0)
        assert filled.admitted_bytes() == admitted + LimitSettings().max_answer_bytes_in_flight
        done = until_state(filled.address("fake"), "done", "failed")
        assert (done["state"], done["refusals"]) == ("done", 1)
        assert filled.states() == {"fake": "done", "b": "running", "c": "waiting"}
        for name in ("b", "c"):
            filled.teachers[name].gate.set()
            assert until_state(filled.address(name), "done", "failed")["state"] == "done"
    assert filled.cache.fresh().targets("fake", "docs").committed.all()


def test_a_job_rests_only_while_none_of_its_calls_gets_on() -> None:
    async def told() -> None:
        schedule, first, second = FillSchedule(1), FillSlot(), FillSlot()
        schedule.request(first)
        schedule.request(second)
        with schedule.asking(first):
            pausing = asyncio.create_task(schedule.pause(first, 3600.0))
            await eventually(lambda: first.pausing == 1)
            assert (first.rests, second.given.is_set()) == (False, False)
        assert (first.rests, second.given.is_set()) == (True, True)
        with schedule.asking(first):
            assert not first.rests
        pausing.cancel()

    asyncio.run(told())


def test_at_most_twice_as_many_begin_as_run_however_many_rest() -> None:
    async def told() -> None:
        schedule, jobs = FillSchedule(2), [FillSlot() for _ in range(7)]
        for job in jobs:
            schedule.request(job)
        begun = [job.given.is_set() for job in jobs]
        assert begun == [True] * 2 + [False] * 5
        pauses = [asyncio.create_task(schedule.pause(job, 3600.0)) for job in jobs[:4]]
        await eventually(lambda: all(job.pausing for job in jobs[:4]))
        assert [job.given.is_set() for job in jobs] == [True] * 4 + [False] * 3
        schedule.end(jobs[5])  # one that was stopped before it began
        pauses[1].cancel()
        await eventually(lambda: not jobs[1].pausing)
        schedule.end(jobs[0])
        assert [job.given.is_set() for job in jobs] == [True] * 5 + [False] * 2
        schedule.end(jobs[2])
        assert not jobs[6].given.is_set()  # two run: the one that went on, and the one that began last
        schedule.end(jobs[1])
        assert jobs[6].given.is_set()
        for pause in pauses:
            pause.cancel()

    asyncio.run(told())


def test_resting_jobs_of_one_key_keep_no_other_key_from_beginning() -> None:
    async def told() -> None:
        schedule = FillSchedule(1)
        spent, others = [FillSlot("ann") for _ in range(3)], [FillSlot(key) for key in ("bob", "bob", "eve")]
        pauses = []
        for slot in spent:
            schedule.request(slot)
        for slot in spent[:2]:
            await eventually(slot.given.is_set)
            pauses.append(asyncio.create_task(schedule.pause(slot, 3600.0)))
        await eventually(lambda: all(slot.rests for slot in spent[:2]))
        for slot in others:
            schedule.request(slot)
        assert [slot.given.is_set() for slot in spent + others] == [True, True, False, True, False, False]
        pauses.append(asyncio.create_task(schedule.pause(others[0], 3600.0)))
        await eventually(others[2].given.is_set)
        schedule.end(others[0])
        assert not others[1].given.is_set()  # the one of eve runs
        schedule.end(others[2])
        assert others[1].given.is_set()
        assert not spent[2].given.is_set()
        for pause in pauses:
            pause.cancel()

    asyncio.run(told())


def test_services_that_wait_for_shards_of_each_other_both_end(tmp_path: Path) -> None:
    """Each one's first job is told to come back later, and its second waits for shards that the other's first has."""
    cache = make_corpus(tmp_path / "c", texts=topics(2, characters=300), shard_positions=300)[0]
    teachers = [{name: MoodyTeacher(teacher_for(cache.corpus("docs"))) for name in ("p", "q")} for _ in range(2)]
    orders = [("p", "q"), ("q", "p")]
    limits = LimitSettings(max_fills_running=1)
    with ExitStack() as served:
        urls = []
        for moody, (first, _) in zip(teachers, orders, strict=True):
            moody[first].errors.append(Overloaded("busy", retry_after=3.0))
            known = [hosted(name, teacher) for name, teacher in moody.items()]
            urls.append(served.enter_context(serving_teachers(*known, cache=cache.fresh(), limits=limits)))
        firsts, seconds = (
            [f"{url}/v1/corpora/docs/fill/{names[i]}" for url, names in zip(urls, orders, strict=True)] for i in (0, 1)
        )
        for addresses in (firsts, seconds):
            for address in addresses:
                http.put(address, json=ONE_BATCH).raise_for_status()
            until(lambda: all(http.get(address).json()["told_to_wait"] for address in firsts))
        for address in firsts + seconds:
            assert until_state(address, "done", "failed")["state"] == "done"
    for name in ("p", "q"):
        assert cache.fresh().targets(name, "docs").committed.all()


def test_the_command_tells_why_a_job_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.cache.commands.progress._LINE_SECONDS", 0.0)
    with Filled(tmp_path / "c", 1).served() as filled:
        filled.teachers["fake"].errors += [Overloaded(SPENT, retry_after=3600.0)] * 4
        filled.teachers["fake"].gate.set()
        filled.put("fake", {"fields": BODY["fields"]})
        until(lambda: filled.states()["fake"] == "waiting")
        watching = threading.Thread(target=run_fill, args=(filled.url, "--top-k", "4", "--patience", "5"))
        watching.start()
        told = ""

        def shown() -> bool:
            nonlocal told
            told += capsys.readouterr().err
            return f"told to come back later (overloaded: {SPENT})" in told

        until(shown)
        assert http.delete(filled.address("fake")).json()["state"] == "stopped"
        watching.join()


def test_what_fills_may_hold_is_among_what_the_service_lets_in() -> None:
    def admitted(**limits: int) -> int:
        return admitted_bytes(Service([], limits=LimitSettings(max_answer_bytes_in_flight=1000, **limits)))

    assert admitted(max_fills_running=5) - admitted(max_fills_running=2) == 3000
    limits = LimitSettings(max_answer_bytes_in_flight=1000)
    rest = limits.max_engine_bytes + limits.max_body_bytes_in_flight + limits.max_miss_bytes_in_flight
    assert admitted() == rest + 1000 + limits.max_fills_running * 1000
