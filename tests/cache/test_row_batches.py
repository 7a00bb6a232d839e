"""Batches of rows hold as much as their budget, or one row that is longer."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from potstill.cache.row_batches import row_batches, row_starts


def batches(lengths: list[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    return [lengths[start:stop] for start, stop in row_batches(row_starts(lengths), budget, max_rows=max_rows)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 30, 4, 6, 1000], [[5, 5], [30], [4, 6], [1000]]),
        ([4, 6, 1, 30, 2, 8, 0], [[4, 6], [1], [30], [2, 8, 0]]),
        ([], []),
    ],
)
def test_a_batch_is_cut_by_the_budget_and_never_within_a_row(lengths: list[int], expected: list[list[int]]) -> None:
    assert batches(lengths, 10) == expected


def test_a_batch_has_at_most_so_many_rows() -> None:
    assert [len(batch) for batch in batches([1, 0] * 1500, 10**6, 1024)] == [1024, 1024, 952]


@given(st.lists(st.integers(0, 20)), st.integers(1, 30), st.none() | st.integers(1, 4))
def test_batches_are_the_rows_in_order_and_as_few_as_may_be(
    lengths: list[int], budget: int, max_rows: int | None
) -> None:
    found = batches(lengths, budget, max_rows)
    assert [length for batch in found for length in batch] == lengths
    assert all(len(batch) == 1 or sum(batch) <= budget for batch in found)
    assert all(max_rows is None or len(batch) <= max_rows for batch in found)
    for batch, following in pairwise(found):
        assert len(batch) == max_rows or sum(batch) + following[0] > budget
