from __future__ import annotations

from contextvars import copy_context

import pytest

from potstill.cache.errors import LimitExceeded, Overloaded
from potstill.teacher_service.access.quotas import Quota, QuotaMeter

MINUTE = Quota(tokens_per_minute=600)
DAY = Quota(tokens_per_day=100)
NOON = 12 * 3600.0
START = 1_000_000 * 86_400 + NOON


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now: float = 77.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def meter_of(clock: Clock) -> QuotaMeter:
    """A meter that starts at noon."""
    return QuotaMeter(lambda: START, clock)


def refused(meter: QuotaMeter, quota: Quota, tokens: int, key: str = "a") -> float:
    with pytest.raises(Overloaded) as caught:
        meter.take(key, quota, tokens)
    assert caught.value.retry_after is not None
    return caught.value.retry_after


def test_a_minute_refills_evenly_and_says_when() -> None:
    clock = Clock()
    meter = meter_of(clock)
    meter.take("a", MINUTE, 600)
    assert refused(meter, MINUTE, 100) == pytest.approx(10.0)
    clock.now += 4
    assert refused(meter, MINUTE, 100) == pytest.approx(6.0)
    clock.now += 6
    meter.take("a", MINUTE, 100)
    assert refused(meter, MINUTE, 1) == pytest.approx(0.1)


def test_keys_do_not_share_a_quota() -> None:
    meter = meter_of(Clock())
    meter.take("a", MINUTE, 600)
    meter.take("b", MINUTE, 600)
    meter.take("free", Quota(), 10**9)
    assert [refused(meter, MINUTE, 60, key) for key in ("a", "b")] == pytest.approx([6.0, 6.0])
    # What was taken without a quota is not owed under one.
    meter.take("free", MINUTE, 600)
    assert refused(meter, MINUTE, 60, "free") == pytest.approx(6.0)


def test_a_call_over_the_minute_waits_for_a_full_bucket_and_is_paid_off_later() -> None:
    clock = Clock()
    meter = meter_of(clock)
    meter.take("a", MINUTE, 1200)
    assert refused(meter, MINUTE, 1200) == pytest.approx(120.0)
    clock.now += 60
    assert refused(meter, MINUTE, 60) == pytest.approx(6.0)
    clock.now += 60
    meter.take("a", MINUTE, 1200)
    assert refused(meter, MINUTE, 1) == pytest.approx(60.1)


def test_a_day_begins_anew_at_midnight() -> None:
    clock = Clock()
    meter = meter_of(clock)
    meter.take("a", DAY, 60)
    assert refused(meter, DAY, 41) == pytest.approx(NOON)
    meter.take("a", DAY, 40)
    clock.now += NOON + 1
    meter.take("a", DAY, 100)
    with pytest.raises(LimitExceeded, match="101 tokens are over tokens_per_day=100 of the key 'a'"):
        meter.take("a", DAY, 101)


def test_what_was_not_scored_comes_back() -> None:
    meter = meter_of(Clock())
    both = Quota(tokens_per_minute=100, tokens_per_day=100)
    meter.take("a", both, 100)
    meter.give_back("a", 60)
    meter.take("a", both, 60)
    assert refused(meter, both, 1) == pytest.approx(0.6)
    meter.give_back("nobody", 5)
    meter.take("nobody", both, 100)
    assert refused(meter, both, 1, "nobody") == pytest.approx(0.6)


def test_a_refusal_costs_nothing() -> None:
    meter = meter_of(Clock())
    meter.take("a", DAY, 90)
    for _ in range(5):
        assert refused(meter, DAY, 20) == pytest.approx(NOON)
    meter.take("a", DAY, 10)
    assert refused(meter, DAY, 1) == pytest.approx(NOON)


def test_a_wall_clock_that_is_set_gives_nothing_away_and_takes_nothing() -> None:
    wall, clock = Clock(START), Clock()
    meter = QuotaMeter(wall, clock)
    both = Quota(tokens_per_minute=600, tokens_per_day=1000)
    meter.take("a", both, 600)
    for step in (3600, -7200, 2 * 86_400, -3 * 86_400):
        wall.now += step
        assert refused(meter, both, 60) == pytest.approx(6.0)
    clock.now += 60
    meter.take("a", both, 400)
    assert refused(meter, both, 1) == pytest.approx(NOON - 60)


def test_what_comes_back_after_midnight_is_of_the_day_before() -> None:
    clock = Clock()
    meter = meter_of(clock)
    # Each call is a task of its own, as in the service.
    late, early = copy_context(), copy_context()
    late.run(meter.take, "a", DAY, 100)
    clock.now += NOON + 1
    early.run(meter.take, "a", DAY, 100)
    late.run(meter.give_back, "a", 100)
    assert refused(meter, DAY, 1) == pytest.approx(2 * NOON - 1)
    early.run(meter.give_back, "a", 40)
    meter.take("a", DAY, 40)
    assert refused(meter, DAY, 1) == pytest.approx(2 * NOON - 1)
