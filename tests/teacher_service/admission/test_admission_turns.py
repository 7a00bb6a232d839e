"""Whose turn it is, who is told to come back, and when."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from potstill.cache.cache import Cache
from potstill.cache.errors import Overloaded
from potstill.cache.read_through.cached_teacher import CachedTeacher
from potstill.teacher_service.access.auth import Caller, Role, caller
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.admission.admission import BATCH_TOKENS, within
from tests.support.admitted import WANT, HeldTeacher, admitted, ask, row, settle
from tests.support.fakes import FakeTeacher


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
    async with admitted(engine, max_engine_tokens=BATCH_TOKENS) as here:
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
