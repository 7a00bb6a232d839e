"""Callers of the cache that ask for the same row at one time, leave, or meet a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import DeadlineExceeded, LimitExceeded, Overloaded, PotstillError, TeacherFailed
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.types import Tokens
from tests.support.fakes import FakeTeacher
from tests.support.scored_rows import assert_same, row
from tests.support.waiting import eventually

POLICY = KeepPolicy(k=16)
WANT = Fields(k=16)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "c", mode="r+")


class Gated(FakeTeacher):
    """Answers only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self._asked = asyncio.Condition()

    async def asked(self, num_rows: int) -> None:
        """Wait until so many rows have come."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.scored) >= num_rows)

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        answers = await super().score(rows, want)
        async with self._asked:
            self._asked.notify_all()
        await self.gate.wait()
        return answers


async def test_callers_that_ask_at_the_same_time_share_one_score(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        asking = [asyncio.create_task(cached.score([row(1, 2), row(i)], WANT)) for i in range(10, 20)]
        await teacher.asked(11)
        teacher.gate.set()
        answers = await asyncio.gather(*asking)
    assert teacher.scored.count(row(1, 2).tobytes()) == 1
    for answer in answers:
        assert_same(answer[0], answers[0][0])
    assert cached.counters.joined == 9


async def test_a_quota_of_nothing_still_answers_and_scores_once_for_those_who_wait_together(cache: Cache) -> None:
    teacher = Gated()
    policy = KeepPolicy(k=16, quota_bytes=0)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=policy) as cached:
        asking = [asyncio.create_task(cached.score([row(1, 2)], WANT)) for _ in range(3)]
        await wait_for_one_row(cached, 3)
        teacher.gate.set()
        await asyncio.gather(*asking)
        assert len(teacher.scored) == 1
        await cached.score([row(1, 2)], WANT)
        assert len(teacher.scored) == 2
    assert cache.root.sizes("journal") == {}


class Refusing(Gated):
    """Refuses the first calls once the gate opens."""

    def __init__(self, error: PotstillError, times: int) -> None:
        super().__init__()
        self._error = error
        self._times = times

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        answers = await super().score(rows, want)
        self._times -= 1
        if self._times >= 0:
            raise self._error
        return answers


@pytest.mark.parametrize("refusal", [Overloaded("full"), DeadlineExceeded("late"), LimitExceeded("over the quota")])
async def test_who_joined_a_score_that_is_refused_is_scored_as_itself(cache: Cache, refusal: PotstillError) -> None:
    teacher = Refusing(refusal, 1)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        first = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        joined = [asyncio.create_task(cached.score([row(1), row(2)], WANT)) for _ in range(3)]
        await teacher.asked(2)
        teacher.gate.set()
        with pytest.raises(type(refusal)):
            await first
        for answers in await asyncio.gather(*joined):
            assert_same(answers[0], (await cached.score([row(1)], WANT))[0])
        assert teacher.scored.count(row(1).tobytes()) == 2, "those that joined share one score again"
        assert cached._in_flight == {}


async def wait_for_one_row(cached: CachedTeacher, callers: int) -> None:
    """Until so many callers wait for the one row that is being scored."""
    await eventually(lambda: _waiters(cached) == callers)


def _waiters(cached: CachedTeacher) -> int:
    return sum(batch.waiters for batches in cached._in_flight.values() for batch in batches)


async def test_who_joined_is_refused_when_it_is_refused_itself_and_when_the_teacher_fails(cache: Cache) -> None:
    for error, calls in ((Overloaded("full"), 3), (TeacherFailed("broken"), 1)):
        teacher = Refusing(error, 99)
        async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
            first = asyncio.create_task(cached.score([row(1)], WANT))
            await teacher.asked(1)
            joined = asyncio.create_task(cached.score([row(1)], WANT))
            await wait_for_one_row(cached, 2)
            teacher.gate.set()
            for asked in (first, joined):
                with pytest.raises(type(error)):
                    await asked
            assert len(teacher.scored) <= calls


async def test_a_caller_that_leaves_does_not_fail_the_others(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        staying = asyncio.create_task(cached.score([row(1)], WANT))
        await wait_for_one_row(cached, 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        teacher.gate.set()
        assert (await staying)[0].num_positions == 1
    assert len(teacher.scored) == 1


async def test_a_failed_score_fails_all_who_wait_and_is_tried_again_by_the_next(cache: Cache) -> None:
    class Failing(FakeTeacher):
        fail = True

        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            await asyncio.sleep(0.05)
            if self.fail:
                raise TeacherFailed("the engine died")
            return await super().score(rows, want)

    teacher = Failing()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        results = await asyncio.gather(*(cached.score([row(1)], WANT) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, TeacherFailed) for result in results)
        teacher.fail = False
        assert (await cached.score([row(1)], WANT))[0].k == 16


async def test_a_row_asked_for_with_two_k_at_once_keeps_its_answers(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        wide = asyncio.create_task(cached.score([row(1, 2)], Fields(k=40)))
        await teacher.asked(1)
        narrow = asyncio.create_task(cached.score([row(1, 2)], Fields(k=20)))
        await wait_for_one_row(cached, 2)
        teacher.gate.set()
        (first,), (joined,) = await narrow, await wide
        assert_same(joined.prefix(20), first)
        assert len(teacher.scored) == 1
        await cached.score([row(1, 2)], Fields(k=50))
        assert_same((await cached.score([row(1, 2)], Fields(k=20)))[0], first)
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        assert_same((await cached.score([row(1, 2)], Fields(k=20)))[0], first)
    assert len(teacher.scored) == 2


async def test_work_that_nobody_waits_for_any_more_is_dropped(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = [asyncio.create_task(cached.score([row(1)], WANT)) for _ in range(2)]
        await wait_for_one_row(cached, 2)
        await teacher.asked(1)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await eventually(lambda: cached._in_flight == {})
        teacher.gate.set()
        assert (await cached.score([row(1)], WANT))[0].num_positions == 1
    assert len(teacher.scored) == 2


async def test_callers_that_come_while_a_score_ends_never_cause_a_second_one(cache: Cache) -> None:
    teacher = FakeTeacher()

    async def ask(number: int, seconds: float) -> Targets:
        await asyncio.sleep(seconds)
        return (await cached.score([row(number, number)], WANT))[0]

    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        for number in range(60):
            answers = await asyncio.gather(*(ask(number, i * 0.0004) for i in range(8)))
            for answer in answers:
                assert_same(answer, answers[0])
    assert len(teacher.scored) == 60


async def test_a_caller_that_comes_as_the_last_one_leaves_gets_a_score_of_its_own(cache: Cache) -> None:
    teacher = Gated()
    async with CachedTeacher.open(teacher, name="smol", cache=cache, policy=POLICY) as cached:
        leaving = asyncio.create_task(cached.score([row(1)], WANT))
        await teacher.asked(1)
        ((key, (batch,)),) = cached._in_flight.items()
        leaving.cancel()
        while not batch.dropped:  # noqa: ASYNC110 -- turns of the loop, not time
            await asyncio.sleep(0)
        assert cached._in_flight == {key: [batch]}, "on its way out, and not out yet"
        joining, _ = cached._join_or_score({key: row(1)}, WANT)
        assert not any(batch.dropped for batch in joining.values())
        teacher.gate.set()
        await cached._wait_for(joining)


async def test_a_bug_in_a_teacher_is_not_told_as_something_to_try_again(cache: Cache) -> None:
    class Buggy(FakeTeacher):
        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            await asyncio.sleep(0)
            raise ZeroDivisionError

    async with CachedTeacher.open(Buggy(), name="smol", cache=cache, policy=POLICY) as cached:
        with pytest.raises(TeacherFailed, match="ended without an answer"):
            await cached.score([row(1)], WANT)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the task reports the bug
