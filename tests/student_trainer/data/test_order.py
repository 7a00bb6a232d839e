"""The order of rows: a pure function, whatever the number of workers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from potstill.student_trainer.data.order import SampleOrder, hashed

FROZEN_HASHES = [13309476754707697221, 4414019431610648415, 5090977316425868581]
FROZEN_ROWS = [0, 5, 4, 6, 1, 3, 8, 11, 10, 7, 3, 6]


def order_of(shards: list[int], left_out: list[int], *, seed: int = 0, window: int = 2) -> SampleOrder:
    shard_rows = np.concatenate([[0], np.cumsum(shards)]).astype(np.int64)
    return SampleOrder(shard_rows, np.array(left_out, dtype=np.int64), seed, window)


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    shards = draw(st.lists(st.integers(1, 7), min_size=1, max_size=8))
    rows = sum(shards)
    left_out = draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    return order_of(shards, sorted(left_out), seed=draw(st.integers(0, 2**63 - 1)), window=draw(st.integers(1, 9)))


@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_training_row_once_and_no_other(order: SampleOrder, epoch: int) -> None:
    size = order.rows_per_epoch
    rows = order.take(epoch * size, size)
    everything = set(range(int(order.shard_rows[-1]))) - set(order.left_out.tolist())
    assert sorted(rows.tolist()) == sorted(everything)


@given(order=orders(), cursor=st.integers(0, 200), count=st.integers(0, 60))
def test_any_cursor_continues_the_same_sequence(order: SampleOrder, cursor: int, count: int) -> None:
    whole = order.take(0, cursor + count)
    fresh = SampleOrder(order.shard_rows, order.left_out, order.seed, order.window_shards)
    np.testing.assert_array_equal(fresh.take(cursor, count), whole[cursor:])


def test_rows_of_a_window_come_from_its_shards() -> None:
    order = order_of([10] * 20, [], window=4)
    rows = order.take(0, 200).reshape(5, 40)
    shards = [sorted({int(row) // 10 for row in window}) for window in rows]
    assert all(len(window) == 4 for window in shards)
    assert sorted(shard for window in shards for shard in window) == list(range(20))
    assert shards != sorted(shards), "shards are shuffled"
    assert all((np.diff(window) != 1).any() for window in rows), "rows are shuffled"


def test_epochs_and_seeds_differ() -> None:
    order, other = order_of([10] * 4, []), order_of([10] * 4, [], seed=1)
    first = order.take(0, 40)
    assert (first != order.take(40, 40)).any()
    assert (first != other.take(0, 40)).any()
    assert [order.epoch(cursor) for cursor in (0, 39, 40)] == [0, 0, 1]


def test_the_order_never_changes() -> None:
    """Runs resume under newer versions of everything: these numbers are frozen."""
    assert hashed(np.arange(3), 7).tolist() == FROZEN_HASHES
    assert order_of([4, 3, 5], [2, 9], seed=7).take(0, 12).tolist() == FROZEN_ROWS


def test_readers_at_several_windows_do_not_take_them_from_each_other() -> None:
    order = order_of([5] * 40, [], window=2)
    numbers = [order.window_number(cursor) for cursor in (0, 12, 25)]
    windows = [order.window(*number) for number in numbers]
    for ahead in (0, 12, 25) * 3:
        order.take(ahead, 1)
    assert all(order.window(*number) is kept for number, kept in zip(numbers, windows, strict=True))
    order.take(0, 200)
    assert order.window(*numbers[0]) is not windows[0], "only a few are kept"


def test_the_next_epochs_first_window_follows_the_last_of_one() -> None:
    order = order_of([5] * 4, [], window=2)
    assert order.shards_of(0, 2).tolist() == order.shards_of(1, 0).tolist()
    assert len(order.shards_of(1, 0)) == 2
