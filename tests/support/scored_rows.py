"""Rows to ask for, and what must be answered for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.cache import Fields, Targets
from potstill.cache.types import Tokens
from potstill.cache.wire import scores as wire
from tests.support.fakes import FakeTeacher

ARRAYS = ("ids", "logprobs", "log_tail", "label_logprob", "entropy", "log_z", "dense")
DRAW_ARRAYS = ("offsets", "ids", "counts")


def row(*ids: int) -> Tokens:
    return np.array(ids, dtype=np.uint32)


def rows_of(*lengths: int) -> list[Tokens]:
    return [(np.arange(length, dtype=np.uint32) + index) % 64 for index, length in enumerate(lengths)]


def assert_scored(rows: Sequence[Tokens], answers: Sequence[Targets], k: int = 4) -> None:
    """They are the top-k of a `FakeTeacher`, bit by bit."""
    fake = FakeTeacher()
    assert len(rows) == len(answers)
    for tokens, targets in zip(rows, answers, strict=True):
        assert_same(targets, fake.distribution(tokens, k))


def assert_same(left: Targets, right: Targets) -> None:
    """Every field: there or not, type, shape and numbers, NaN included."""
    arrays = [(name, getattr(left, name), getattr(right, name)) for name in ARRAYS]
    assert (left.draws is None) == (right.draws is None)
    if left.draws is not None:
        arrays += [(name, getattr(left.draws, name), getattr(right.draws, name)) for name in DRAW_ARRAYS]
    for name, a, b in arrays:
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, err_msg=name)


def arrow_answer(want: Fields) -> bytes:
    """The body that answers two rows of nine tokens."""
    teacher = FakeTeacher()
    tokens = np.arange(9, dtype=np.uint32)
    return wire.answer_to_arrow(wire.ScoreAnswer(teacher.identity, [teacher.targets(tokens, want)] * 2), want)


def random_targets(seed: int, num_tokens: int, k: int, vocab_size: int) -> tuple[Tokens, Targets]:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, vocab_size)), axis=1)[:, :k].astype(np.uint32)
    logprobs = np.sort(-(10.0 ** rng.uniform(-9, 5, (num_tokens, k))), axis=1)[:, ::-1].astype(np.float32)
    logprobs[rng.random((num_tokens, k)) < 0.1] = -np.inf
    label = -(10.0 ** rng.uniform(-3, 3, num_tokens)).astype(np.float32)
    row = rng.integers(0, vocab_size, num_tokens).astype(np.uint32)
    return row, Targets(ids, logprobs, np.zeros(num_tokens, np.float32), label)


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key twice: {pairs}"
    return dict(pairs)
