from __future__ import annotations

from collections import Counter

import pytest

from potstill.cache.errors import Overloaded
from potstill.teacher_service.admission.fair_queue import Batch, Call, FairQueue


def call_of(key: str, *sizes: int) -> Call:
    call = Call(key, sum(sizes))
    call.batches.extend(Batch(call, (), size, size) for size in sizes)
    return call


def filled(*calls: Call) -> FairQueue:
    queue = FairQueue()
    for call in calls:
        queue.push(call)
    return queue


def served(queue: FairQueue, count: int) -> list[str]:
    return [queue.pop().call.key for _ in range(count)]


async def test_one_key_is_served_in_order() -> None:
    calls = [call_of("a", size) for size in (3, 9, 1)]
    queue = filled(*calls)
    assert queue.tokens == 13
    assert [queue.pop().call for _ in calls] == calls
    assert (queue.head(), queue.tokens) == (None, 0)


async def test_keys_get_equal_tokens_whatever_the_size_of_their_calls() -> None:
    queue = filled(*(call_of("big", 100) for _ in range(50)), *(call_of("small", 10) for _ in range(500)))
    tokens: Counter[str] = Counter()
    for _ in range(330):
        batch = queue.pop()
        tokens[batch.call.key] += batch.tokens
        assert abs(tokens["big"] - tokens["small"]) <= 110


async def test_a_key_that_comes_late_is_not_behind_what_another_has_waiting() -> None:
    queue = filled(*(call_of("much", 100) for _ in range(50)))
    served(queue, 10)
    queue.push(call_of("little", 100))
    assert "little" in served(queue, 2)


async def test_an_idle_key_saves_nothing_up() -> None:
    queue = filled(call_of("a", 10), call_of("b", 10), *(call_of("b", 10) for _ in range(99)))
    served(queue, 60)  # a had its one batch, and was idle since
    for _ in range(40):
        queue.push(call_of("a", 10))
    assert Counter(served(queue, 20)) in ({"a": 10, "b": 10}, {"a": 11, "b": 9})


async def test_what_is_dropped_is_not_charged() -> None:
    gone = call_of("a", *[100] * 50)
    queue = filled(gone, call_of("a", 10), *(call_of("b", 10) for _ in range(5)))
    for _ in range(2):
        queue.drop(gone)
        assert queue.tokens == 60
    assert all(batch.admitted.cancelled() for batch in gone.batches)
    assert "a" in served(queue, 2)


async def test_who_gives_way_is_told_why() -> None:
    call = call_of("a", 5)
    queue = filled(call)
    queue.drop(call, Overloaded("make way", retry_after=3.0))
    with pytest.raises(Overloaded, match="make way"):
        await call.batches[0].admitted


async def test_the_newest_calls_of_the_heaviest_key_are_those_that_have_not_begun() -> None:
    first, second, third = call_of("a", 10, 10), call_of("a", 10), call_of("a", 10)
    queue = filled(first, second, third, call_of("b", 25))
    assert queue.heaviest_key() == "a"
    first.tokens_begun = queue.pop().tokens
    assert queue.newest_unstarted("a") == [third, second]
    assert queue.newest_unstarted("nobody") == []
    assert FairQueue().heaviest_key() is None


async def test_ahead_is_what_is_served_before() -> None:
    queue = filled(call_of("much", 1000), call_of("little", 20))
    assert queue.tokens_ahead("new", 100) == 100 + 20
    assert queue.tokens_ahead("much", 100) == 1000 + 20
    assert queue.tokens_ahead("little", 5) == 20 + 25


async def test_keys_that_left_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(1000):
        queue.push(call_of(f"key-{number}", 5))
        queue.push(call_of("always", 5))
        served(queue, 1)
        if number > 3:
            served(queue, 1)
    assert len(queue._queues) < 12
