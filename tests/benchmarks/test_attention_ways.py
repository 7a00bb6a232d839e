"""The benchmark of ways to attend, in small: its errors, and nothing about its times."""

from __future__ import annotations

import pytest
import torch

from benchmarks.student.attention_ways import MASKED, PLAIN, measured

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_every_way_with_alibi_is_exact_and_fewer_parts_of_the_bias_are_not() -> None:
    shape, cpu = (2, 600, 16), torch.device("cpu")
    exact = measured(shape, torch.float32, cpu, rounds=1)
    assert set(exact) == {MASKED, "wider keys", PLAIN}
    assert exact[MASKED].error < 1e-5
    assert exact["wider keys"].error < 1e-4
    half = {name: one.error for name, one in measured(shape, torch.bfloat16, cpu, rounds=1).items()}
    assert half["wider keys"] < 0.02
    assert half["wider keys, only 2 of 3 parts"] < 0.02
    assert half["wider keys, only 1 of 3 parts"] > 0.05
    assert half[PLAIN] > 0.05
