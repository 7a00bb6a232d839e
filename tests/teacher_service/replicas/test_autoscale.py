"""Autoscaling as arithmetic: time and tokens go in, a number of replicas comes out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from pydantic import ValidationError

from potstill.teacher_service.replicas.autoscale import Autoscaler
from potstill.teacher_service.settings.replicas import AutoscaleSettings, ReplicaSettings

LIMITS = AutoscaleSettings(min=1, max=4, tokens_per_replica=1000, up_seconds=5.0, down_seconds=60.0)


def followed(waiting: Iterable[int], *, limits: AutoscaleSettings = LIMITS, replicas: int = 1) -> list[int]:
    """The number of replicas after each second's tokens."""
    autoscaler = Autoscaler(limits)
    numbers = []
    for second, tokens in enumerate(waiting):
        replicas = autoscaler.wanted(now=float(second), tokens_waiting=tokens, replicas=replicas)
        numbers.append(replicas)
    return numbers


def test_a_need_that_lasts_is_met_after_its_time() -> None:
    assert followed([0] * 10 + [2500] * 10) == [1] * 15 + [3] * 5


def test_a_short_burst_changes_nothing() -> None:
    assert followed([0] * 10 + [9000] * 5 + [0] * 10) == [1] * 25


def test_of_a_need_that_varies_only_what_lasts_is_added() -> None:
    assert max(followed([1500, 9000] * 10)) == 2


def test_replicas_are_taken_away_after_a_long_pause_only() -> None:
    numbers = followed([3500] * 10 + [0] * 70)
    assert numbers[9] == 4
    assert numbers[69] == 4
    assert numbers[70] == 1


def test_a_need_within_the_pause_keeps_them() -> None:
    assert set(followed(([3500] + [0] * 50) * 4, replicas=4)) == {4}


def test_the_limits_hold_whatever_waits() -> None:
    at_once = AutoscaleSettings(min=2, max=3, tokens_per_replica=10, up_seconds=0.0, down_seconds=0.0)
    assert followed([0, 10**9, 0], limits=at_once) == [2, 3, 2]
    assert followed([10**9], limits=at_once, replicas=9) == [3]


def test_exactly_full_replicas_are_enough() -> None:
    at_once = AutoscaleSettings(min=1, max=3, tokens_per_replica=10, up_seconds=0.0, down_seconds=0.0)
    assert followed([10, 11, 20, 21, 0], limits=at_once) == [1, 2, 2, 3, 1]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="max is 2, less than min=3"):
        AutoscaleSettings(min=3, max=2, tokens_per_replica=1)
    with pytest.raises(ValidationError, match="replicas is 9, over max_replicas=8"):
        ReplicaSettings(replicas=9)
    with pytest.raises(ValidationError, match="exclude each other"):
        ReplicaSettings(replicas=1, autoscale=LIMITS)
    with pytest.raises(ValidationError, match="max is 9, over max_replicas=8"):
        ReplicaSettings(autoscale=AutoscaleSettings(max=9, tokens_per_replica=1))
