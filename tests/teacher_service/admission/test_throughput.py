"""The measured rate of an engine."""

from __future__ import annotations

import pytest

from potstill.teacher_service.admission.engine_queue import Throughput


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
