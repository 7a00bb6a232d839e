"""What is evaluated on comes the same every time, and is read once as far as memory is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.types import Targets, Tokens
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.repeated import RepeatedBatches
from potstill.student_trainer.data.sources import TargetSource
from tests.support.tiny_runs import K, fake_teacher, write_cache

ROWS = 50


def tokens_of(batches: RepeatedBatches) -> list[list[list[int]]]:
    with batches.read() as found:
        return [batch.tokens.tolist() for batch in found]


@pytest.mark.parametrize("kept_bytes", [0, 5_000, 1 << 30])
def test_batches_are_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    monkeypatch.setattr("potstill.student_trainer.data.repeated._KEPT_BYTES", kept_bytes)
    asked: list[int] = []

    def read(indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        asked.extend(indexes)
        return [fake_teacher().distribution(row, K) for row in rows]

    corpus = Cache.open(write_cache(tmp_path)).corpus("docs")
    source = TargetSource("fake", fake_teacher().identity, "k=8, encoding f32", read)
    batches = RepeatedBatches(BatchReader(corpus, (source,), (1.0,)), np.arange(ROWS), 2, pack=True, readers=2)
    first = tokens_of(batches)
    assert sorted(asked) == list(range(ROWS))
    assert tokens_of(batches) == tokens_of(batches) == first
    again = len(asked) - ROWS
    assert again == {0: 2 * ROWS, 1 << 30: 0}.get(kept_bytes, again)
    assert again % 2 == 0
    assert kept_bytes != 5_000 or 0 < again < 2 * ROWS
