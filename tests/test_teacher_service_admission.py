from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache import Fields, Targets
from cache.cache import Cache
from cache.cached import CachedTeacher
from cache.errors import DeadlineExceeded, LimitExceeded, Overloaded, TeacherFailed
from cache.types import Tokens
from teacher_service.admission import PART_TOKENS, Admission, AdmittedTeacher, split_parts, within
from teacher_service.auth import Caller, Role, caller
from teacher_service.quotas import Quota
from teacher_service.replicas import LocalPool
from teacher_service.request_limits import engine_bytes_per_token
from teacher_service.settings import LimitSettings
from teacher_service.throughput import Throughput
from tests.fakes import FakeTeacher
from tests.servers import opens

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


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  set by threads and by many tasks
            await asyncio.sleep(0.001)


async def test_answers_are_those_of_the_pool_whatever_the_parts() -> None:
    engine = FakeTeacher()
    rows = [row(number, 300) for number in range(30)]
    async with admitted(engine) as here:
        answers = await here.teacher.score(rows, WANT)
        assert here.teacher.identity == engine.identity
        assert here.teacher.provenance == engine.provenance
        assert here.teacher.limits == engine.limits
        assert await here.teacher.score([], WANT) == []
    for tokens, got in zip(rows, answers, strict=True):
        np.testing.assert_array_equal(got.ids, engine.targets(tokens, WANT).ids)


def test_rows_are_split_into_parts_and_a_longer_row_is_one() -> None:
    rows = [row(number, size) for number, size in enumerate((5, 5, 30, 4, 6, 1000))]
    parts = [[len(tokens) for tokens in part] for part in split_parts(rows, 10)]
    assert parts == [[5, 5], [30], [4, 6], [1000]]
    assert list(split_parts([], 10)) == []


async def test_the_engine_holds_no_more_than_its_bound_and_all_is_scored() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=100) as here:
        asked = [ask(here.teacher, [row(number, 30)]) for number in range(10)]
        await settle()
        assert (engine.tokens_inside, here.tokens_waiting) == (90, 210)
        assert here.admission.tokens_in_flight == 90
        assert here.admission.tokens_waiting == 210
        engine.gate.set()
        assert len(await asyncio.gather(*asked)) == 10
        assert engine.most_inside == 90
        assert (here.admission.tokens_in_flight, here.tokens_waiting) == (0, 0)
    assert here.admission.queues == {}


async def test_a_row_over_the_engine_bound_goes_in_alone() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=100) as here:
        small = ask(here.teacher, [row(1)])
        large = ask(here.teacher, [row(2, 150)])
        after = ask(here.teacher, [row(3)])
        await settle()
        assert (engine.tokens_inside, here.tokens_waiting) == (10, 160)
        engine.gate.set()
        await asyncio.gather(small, large, after)
        assert engine.most_inside == 150


async def test_the_engines_memory_bounds_what_is_inside() -> None:
    engine = HeldTeacher()
    per_token = engine_bytes_per_token(WANT, 64, "fake")
    async with admitted(engine, max_engine_bytes=100 * per_token) as here:
        asked = [ask(here.teacher, [row(number, 40)]) for number in range(5)]
        await settle()
        assert engine.tokens_inside == 80
        engine.gate.set()
        await asyncio.gather(*asked)
        # One call over it goes in parts; one row cannot.
        await ask(here.teacher, [row(number, 60) for number in range(5)])
        assert engine.most_inside <= 100
        with pytest.raises(LimitExceeded, match=rf"a row of 101 tokens.*max_engine_bytes={100 * per_token}"):
            await ask(here.teacher, [row(9, 101)])


def test_what_a_token_costs_grows_with_what_is_wanted() -> None:
    plain = engine_bytes_per_token(Fields(k=64), 50_000, "sampler")
    assert plain == 80 + 3 * (8 * 64 + 8)
    assert engine_bytes_per_token(Fields(k=64, dense=True), 50_000, "sampler") == plain + 3 * 4 * 50_000
    assert engine_bytes_per_token(Fields(k=64), 50_000, "public-flat") == plain + 90 * 65


async def test_a_key_that_sends_much_does_not_starve_one_that_sends_little() -> None:
    engine = FakeTeacher(tokens_per_second=100_000)
    async with admitted(engine, max_engine_tokens=500) as here:
        flood = [ask(here.teacher, [row(number, 100)], "much") for number in range(200)]
        await settle()
        for number in range(5):
            await ask(here.teacher, [row(1000 + number, 100)], "little")
        # Each waited for what was in the engine and one turn of the other, not for the 20,000 tokens before it.
        little = {row(1000 + number, 100).tobytes() for number in range(5)}
        last = max(place for place, scored in enumerate(engine.scored) if scored in little)
        assert last < 120
        assert len(await asyncio.gather(*flood)) == 200


async def test_one_large_call_does_not_hold_up_another_key() -> None:
    engine = FakeTeacher(tokens_per_second=2_000_000)
    async with admitted(engine, max_engine_tokens=PART_TOKENS) as here:
        large = ask(here.teacher, [row(number, 256) for number in range(200)], "much")
        await settle()
        await ask(here.teacher, [row(9999)], "little")
        assert not large.done()
        assert engine.scored.index(row(9999).tobytes()) < 100
        assert len(await large) == 200


async def test_two_busy_keys_share_the_engine_equally_though_one_sends_ten_times_more() -> None:
    engine = FakeTeacher(tokens_per_second=200_000)
    async with admitted(engine, max_engine_tokens=200) as here:
        much = [row(number, 50) for number in range(500)]
        little = [row(1000 + number, 50) for number in range(50)]
        asked = [ask(here.teacher, [tokens], "much") for tokens in much]
        asked += [ask(here.teacher, [tokens], "little") for tokens in little]
        await asyncio.gather(*asked)
        owners = {tokens.tobytes(): "little" for tokens in little}
        shares = Counter(owners.get(scored, "much") for scored in engine.scored[:104])
        assert 45 <= shares["little"] <= 50


async def test_work_whose_caller_left_never_reaches_the_engine() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=10) as here:
        first = ask(here.teacher, [row(1)])
        await settle()
        gone = [ask(here.teacher, [row(100 + number)]) for number in range(5)]
        last = ask(here.teacher, [row(2)])
        await settle()
        assert here.tokens_waiting == 60
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert here.tokens_waiting == 10
        engine.gate.set()
        await asyncio.gather(first, last)
    assert engine.scored == [row(1).tobytes(), row(2).tobytes()]


async def test_work_whose_deadline_passes_in_the_queue_never_reaches_the_engine() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=10) as here:
        first = ask(here.teacher, [row(1)])
        await settle()
        now = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match="0.05 seconds"):
            await within(0.05, now, here.teacher.score([row(2)], WANT))
        assert here.tokens_waiting == 0
        engine.gate.set()
        await first
    assert engine.scored == [row(1).tobytes()]


async def test_behind_the_cache_a_miss_that_nobody_waits_for_is_dropped_from_the_queue(tmp_path: Path) -> None:
    engine = HeldTeacher()
    cache = Cache.open(tmp_path / "cache", mode="r+")
    async with (
        admitted(engine, max_engine_tokens=10) as here,
        CachedTeacher.open(here.teacher, name="smol", cache=cache) as front,
    ):
        first = ask(front, [row(1)])
        await until(lambda: engine.tokens_inside > 0)
        left, stays = ask(front, [row(2)]), ask(front, [row(2)])
        gone = ask(front, [row(3)])
        await until(lambda: here.tokens_waiting == 20)
        for task in (left, gone):
            task.cancel()
        await asyncio.gather(left, gone, return_exceptions=True)
        await settle()
        assert here.tokens_waiting == 10
        engine.gate.set()
        await asyncio.gather(first, stays)
        assert engine.scored == [row(1).tobytes(), row(2).tobytes()]
        # Hits pass no queue, and need no engine.
        engine.gate.clear()
        await ask(front, [row(1), row(2)])


async def test_what_cannot_begin_before_its_deadline_is_refused_at_once() -> None:
    engine = FakeTeacher(tokens_per_second=1000)
    async with admitted(engine, max_engine_tokens=50) as here:
        await ask(here.teacher, [row(0, 50)])
        waiting = [ask(here.teacher, [row(number, 50)]) for number in range(1, 40)]
        await settle()
        now = asyncio.get_running_loop().time()
        caller.set(Caller("a", Role.TRAINER))
        with pytest.raises(Overloaded, match="could not begin within the 0.5 seconds") as caught:
            await within(0.5, now, here.teacher.score([row(99)], WANT))
        # Another key is not behind all that.
        caller.set(Caller("b", Role.TRAINER))
        assert len(await within(0.5, now, here.teacher.score([row(98)], WANT))) == 1
        assert caught.value.retry_after is not None
        assert here.admission.refusals["deadline"] == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        caller.set(Caller("a", Role.TRAINER))
        assert len(await within(5.0, now, here.teacher.score([row(99)], WANT))) == 1


async def test_retry_after_grows_with_the_queue_at_the_measured_rate() -> None:
    engine = FakeTeacher(tokens_per_second=1000)
    seconds = []
    async with admitted(engine, max_engine_tokens=100, max_tokens_in_flight=20_000) as here:
        await ask(here.teacher, [row(0, 100)])
        queue = here.admission.queues["smol"]
        assert 0 < queue.tokens_per_second < 1100
        asked = []
        for _ in range(3):
            asked += [ask(here.teacher, [row(number, 100)]) for number in range(50)]
            await settle()
            with pytest.raises(Overloaded, match="max_tokens_in_flight=20000") as caught:
                await ask(here.teacher, [row(7, 20_000)])
            expected = min(queue.tokens_waiting / queue.tokens_per_second, 60.0)
            assert caught.value.retry_after == pytest.approx(expected, rel=0.1)
            seconds.append(caught.value.retry_after or 0.0)
        assert +here.admission.refusals == {"queue": 3}
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    assert 4 < seconds[0] < seconds[1] <= seconds[2] <= 60


async def test_retry_after_is_between_a_second_and_a_minute() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_tokens_in_flight=1000, max_engine_tokens=10) as here:
        queue = here.admission.queues["smol"]
        assert queue.retry_after == 1.0
        asked = ask(here.teacher, [row(1, 900)]), ask(here.teacher, [row(2, 90)])
        await settle()
        queue._throughput._tokens, queue._throughput._seconds = 1.0, 1.0
        assert queue.retry_after == 60.0
        engine.gate.set()
        await asyncio.gather(*asked)


async def test_a_full_queue_makes_room_for_a_key_with_less_by_refusing_the_newest_of_the_heaviest() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=100, max_tokens_in_flight=1000) as here:
        much = [ask(here.teacher, [row(number, 100)], "much") for number in range(10)]
        await settle()
        little = ask(here.teacher, [row(99, 150)], "little")
        await settle()
        refused = [task for task in much if task.done()]
        assert refused == much[-2:]
        for task in refused:
            with pytest.raises(Overloaded, match="the key with the most waiting gives way") as caught:
                await task
            assert caught.value.retry_after is not None
        assert +here.admission.refusals == {"pushed_out": 2}
        with pytest.raises(Overloaded, match="850 tokens wait|wait and 100 are in the engine"):
            await ask(here.teacher, [row(98, 100)], "much")
        engine.gate.set()
        assert len(await little) == 1
        await asyncio.gather(*much[:-2])


async def test_a_key_with_more_waiting_than_the_others_makes_nobody_give_way() -> None:
    engine = HeldTeacher()
    async with admitted(engine, max_engine_tokens=10, max_tokens_in_flight=1000) as here:
        asked = [ask(here.teacher, [row(number, 100)], key) for number, key in enumerate("aaabbbb")]
        await settle()
        with pytest.raises(Overloaded):
            await ask(here.teacher, [row(50, 400)], "c")
        assert +here.admission.refusals == {"queue": 1}
        engine.gate.set()
        await asyncio.gather(*asked)


async def test_a_quota_counts_what_was_scored_and_is_given_back_for_what_was_not() -> None:
    engine = HeldTeacher()
    quota = Quota(tokens_per_day=100)
    async with admitted(engine, max_engine_tokens=10) as here:
        first = ask(here.teacher, [row(1)], quota=quota)
        await settle()
        gone = ask(here.teacher, [row(2, 90)], quota=quota)
        await settle()
        with pytest.raises(Overloaded, match="tokens_per_day=100 of the key 'a'"):
            await ask(here.teacher, [row(3)], quota=quota)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        engine.gate.set()
        await first
        await ask(here.teacher, [row(3, 90)], quota=quota)
        with pytest.raises(Overloaded) as caught:
            await ask(here.teacher, [row(4)], quota=quota)
        assert caught.value.retry_after is not None
        assert +here.admission.refusals == {"quota": 2}
        await ask(here.teacher, [row(4)], key="b", quota=quota)


async def test_hits_cost_no_quota(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", mode="r+")
    quota = Quota(tokens_per_day=20)
    async with (
        admitted(FakeTeacher()) as here,
        CachedTeacher.open(here.teacher, name="smol", cache=cache) as front,
    ):
        for _ in range(5):
            await ask(front, [row(1), row(2)], quota=quota)
        with pytest.raises(Overloaded, match="tokens_per_day"):
            await ask(front, [row(3)], quota=quota)


async def test_what_a_part_fails_of_the_call_fails_of_and_nothing_stays_behind() -> None:
    class Failing(FakeTeacher):
        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            if any(int(tokens[0]) == 13 for tokens in rows):
                raise TeacherFailed("number 13")
            return await super().score(rows, want)

    async with admitted(Failing(tokens_per_second=1e6), max_engine_tokens=4096) as here:
        with pytest.raises(TeacherFailed, match="number 13"):
            await ask(here.teacher, [row(number, 1000) for number in range(40)])
        assert (here.admission.tokens_in_flight, here.tokens_waiting) == (0, 0)
        assert here.admission.queues["smol"].bytes_in_flight == 0
        assert len(await ask(here.teacher, [row(1)])) == 1


async def test_callers_that_leave_at_any_moment_leave_nothing_behind() -> None:
    engine = FakeTeacher(tokens_per_second=500_000)
    rng = np.random.default_rng(7)
    async with admitted(engine, max_engine_tokens=3000) as here:
        asked = [
            ask(here.teacher, [row(number, int(size)) for size in rng.integers(3, 900, 6)], f"key-{number % 3}")
            for number in range(60)
        ]
        for task in asked[::2]:
            await asyncio.sleep(float(rng.uniform(0, 0.003)))
            task.cancel()
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, list) for answer in done[1::2])
        queue = here.admission.queues["smol"]
        assert (queue.tokens_in_flight, queue.tokens_waiting, queue.bytes_in_flight) == (0, 0, 0)


def test_throughput_is_of_busy_time_and_forgets() -> None:
    now = 0.0
    speed = Throughput(lambda: now)
    assert speed.tokens_per_second == 0.0
    for _ in range(10):
        now += 1000.0  # idle
        speed.begin()
        now += 1.0
        speed.finish(100)
        speed.finish(100)
    assert speed.tokens_per_second == pytest.approx(200.0)
    speed.begin()
    for _ in range(200):
        now += 1.0
        speed.finish(10)
    assert speed.tokens_per_second == pytest.approx(10.0, rel=0.05)
