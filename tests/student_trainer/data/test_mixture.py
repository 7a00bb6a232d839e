"""The order of rows from several corpora: a pure function, in the corpora's shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, strategies as st

from potstill.student_trainer.data.mixture import MixtureOrder
from potstill.student_trainer.data.order import SampleOrder
from potstill.student_trainer.data.settings import Points

FROZEN_CORPORA = [1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]


def mixture_of(rows: Sequence[int], weights: Sequence[Points], *, batch_rows: int = 8, seed: int = 0) -> MixtureOrder:
    nothing = np.zeros(0, dtype=np.int64)
    orders = tuple(SampleOrder(np.array([0, n // 2, n]), nothing, seed) for n in rows)
    first_rows = np.cumsum([0, *rows])
    return MixtureOrder(orders, first_rows, tuple(weights), batch_rows, seed)


def constant(*weights: float) -> list[Points]:
    return [((0, weight),) for weight in weights]


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOrder:
    rows = draw(st.lists(st.integers(2, 40), min_size=1, max_size=4))
    points = st.tuples(st.integers(0, 3), st.floats(0.01, 5), st.integers(4, 9), st.floats(0.01, 5))
    drawn = [draw(points) for _ in rows]
    weights = [((a, v), (b, w)) for a, v, b, w in drawn]
    return mixture_of(rows, weights, batch_rows=draw(st.integers(1, 17)), seed=draw(st.integers(0, 2**63 - 1)))


@given(order=mixtures(), cursor=st.integers(0, 200), count=st.integers(0, 60))
def test_any_cursor_continues_the_same_sequence(order: MixtureOrder, cursor: int, count: int) -> None:
    whole = order.take(0, cursor + count)
    fresh = MixtureOrder(order.orders, order.first_rows, order.weights, order.batch_rows, order.seed)
    np.testing.assert_array_equal(fresh.take(cursor, count), whole[cursor:])


@given(order=mixtures(), step=st.integers(0, 30), data=st.data())
def test_the_ranks_slices_make_up_the_global_batch(order: MixtureOrder, step: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, order.batch_rows))
    parts = [order.rank_slice(step, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), order.take(step * order.batch_rows, order.batch_rows))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_each_corpus_is_gone_through_in_its_own_order() -> None:
    order = mixture_of([30, 10], constant(0.8, 0.2))
    rows = order.take(0, 500)
    for m in range(2):
        own = rows[(rows >= order.first_rows[m]) & (rows < order.first_rows[m + 1])] - order.first_rows[m]
        np.testing.assert_array_equal(own, order.orders[m].take(0, len(own)))
    assert order.epochs(0) == [0, 0]
    assert order.epochs(500) == [(int(n) - 1) // size for n, size in zip(order.counts(500), (30, 10), strict=True)]


def test_one_corpus_is_drawn_from_as_without_a_mixture() -> None:
    order = mixture_of([30], constant(3.0), seed=5)
    np.testing.assert_array_equal(order.take(7, 60), order.orders[0].take(7, 60))
    assert order.counts(60).tolist() == [60]


def test_any_stretch_has_the_corpora_in_their_shares() -> None:
    shares = np.array([0.7, 0.2, 0.1])
    order = mixture_of([50, 50, 50], constant(*(7 * shares)), seed=11)
    corpus_of = order.corpus_of(0, 200_000)
    for length in (100, 1000, 65_536, 150_000):
        for start in (0, 777, 40_000):
            found = np.bincount(corpus_of[start : start + length], minlength=3)
            # Independent draws would be off by sqrt(n p (1 - p)), 177 rows of the longest stretch.
            assert np.abs(found - length * shares).max() < 6
    np.testing.assert_array_equal(order.counts(150_000), np.bincount(corpus_of[:150_000], minlength=3))


def test_weights_change_over_the_steps() -> None:
    order = mixture_of([50, 50], [((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))], batch_rows=40)
    share = [np.mean(order.corpus_of(step * 40, 400)) for step in (0, 25, 50, 90, 200)]
    np.testing.assert_allclose(share, [0.045, 0.295, 0.545, 0.945, 1.0], atol=0.02)
    assert order.corpus_of(0, 40).max() == 0, "a weight of 0 draws none"


def test_the_mixture_never_changes() -> None:
    """Runs resume under newer versions of everything: these numbers are frozen."""
    assert mixture_of([9, 9], constant(0.6, 0.4), seed=7).corpus_of(3, 12).tolist() == FROZEN_CORPORA
