from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Fields, Targets
from potstill.cache.cache import Cache
from potstill.cache.errors import DeadlineExceeded, LimitExceeded, TeacherFailed
from potstill.cache.read_through.cached_teacher import CachedTeacher
from potstill.cache.types import Tokens
from potstill.teacher_service.admission.admission import within
from potstill.teacher_service.admission.limits import engine_bytes_per_token
from tests.support.admitted import WANT, HeldTeacher, admitted, ask, row, settle
from tests.support.fakes import FakeTeacher
from tests.support.waiting import eventually


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
        await eventually(lambda: engine.tokens_inside > 0)
        left, stays = ask(front, [row(2)]), ask(front, [row(2)])
        gone = ask(front, [row(3)])
        await eventually(lambda: here.tokens_waiting == 20)
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
