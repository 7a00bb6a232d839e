"""The choice of rows that no student is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.data.held_out import choose_held_out, with_copies
from tests.support.tiny_runs import write_cache, write_texts_cache

FROZEN_HELD_OUT = [157, 272, 420, 933, 962]


def test_the_choice_never_changes() -> None:
    """Runs resume under newer versions of everything: these numbers are frozen."""
    assert choose_held_out(1000, 5, 0).tolist() == FROZEN_HELD_OUT


@settings(max_examples=50)
@given(num_rows=st.integers(2, 500), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_held_out_rows_are_distinct_rows(num_rows: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, num_rows - 1))
    rows = choose_held_out(num_rows, count, seed)
    assert len(rows) == len(set(rows.tolist())) == count
    assert sorted(rows.tolist()) == rows.tolist()
    assert all(0 <= row < num_rows for row in rows)


def test_held_out_counts_and_shares() -> None:
    assert len(choose_held_out(1000, 0.05, 0)) == 50
    assert len(choose_held_out(10, 0.01, 0)) == 1
    assert len(choose_held_out(10, 0, 0)) == 0
    assert set(choose_held_out(1000, 50, 0)) != set(choose_held_out(1000, 50, 1))
    with pytest.raises(InvalidInput, match=r"data\.held_out is 10"):
        choose_held_out(10, 10, 0)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"w1 w2 w{3 + i % 4}" for i in range(20)]
    return write_texts_cache(tmp_path_factory.mktemp("repeated"), texts)


def test_copies_of_held_out_rows_are_left_out_too(repeated: Path) -> None:
    corpus = Cache.open(repeated).corpus("docs")
    left_out = with_copies(corpus, np.array([1]))
    expected = [i for i in range(len(corpus)) if (corpus.row(i) == corpus.row(1)).all()]
    assert left_out.tolist() == expected
    assert len(expected) == 5


def test_without_repeated_rows_nothing_else_is_left_out(tmp_path: Path) -> None:
    corpus = Cache.open(write_cache(tmp_path, documents=6, teachers=())).corpus("docs")
    rows: NDArray[np.int64] = np.array([0, 3])
    assert with_copies(corpus, rows) is rows
