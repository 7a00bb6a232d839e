"""The compiled sweep over a row of logits: the order of equal entries, masked ids, and the exponential."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from potstill.cache.compiled import compiled
from potstill.teacher_service.capture.cpu.kernel import Arrays, _bound, fill
from potstill.teacher_service.capture.layout import Drawn

LEVELS = (-np.inf, -3.3e38, -1e30, -50.0, -0.0, 0.0, 1.0, 1.0000001, 40.0)


def top_k_of(logits: NDArray[np.float32], k: int) -> Arrays:
    num_rows, vocab_size = logits.shape
    arrays = nothing_of(num_rows, vocab_size)._replace(
        ids=np.full((num_rows, k), -1, np.int32),
        logprobs=np.empty((num_rows, k), np.float32),
        labels=np.arange(num_rows) % vocab_size,
        label_logprob=np.empty(num_rows, np.float32),
    )
    fill(logits, arrays)
    return arrays


def nothing_of(num_rows: int, vocab_size: int) -> Arrays:
    """The arrays where no field is wanted."""
    nothing, of_no_columns = np.empty(0, np.float32), np.empty((num_rows, 0), np.float32)
    return Arrays(
        top=np.empty(num_rows, np.float32),
        ids=np.empty((num_rows, 0), np.int32),
        logprobs=of_no_columns,
        labels=np.empty(0, np.int64),
        label_logprob=nothing,
        entropy=nothing,
        temperatures=np.empty(0),
        log_z=of_no_columns,
        dense=np.empty((0, vocab_size), np.float32),
        uniforms=np.empty((num_rows, 0)),
    )


def drawn_from(row: NDArray[np.float32], uniforms: NDArray[np.float64]) -> Drawn:
    return fill(row[None], nothing_of(1, len(row))._replace(uniforms=uniforms[None]))


@given(data=st.data(), vocab_size=st.integers(1, 2000), seed=st.integers(0, 2**32 - 1))
def test_the_best_come_first_and_equal_ones_by_rising_id(data: st.DataObject, vocab_size: int, seed: int) -> None:
    k = data.draw(st.integers(1, vocab_size))
    levels = data.draw(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=len(LEVELS)))
    row = np.random.default_rng(seed).choice(np.array(levels, np.float32), vocab_size)
    row[seed % vocab_size] = 2.0  # one with mass
    expected = np.argsort(-row, kind="stable")[:k]
    np.testing.assert_array_equal(top_k_of(row[None], k).ids[0], expected)


@pytest.mark.parametrize("k", [1, 64, 600, 3000])
def test_more_candidates_than_are_ranked_are_sorted(k: int) -> None:
    row = np.random.default_rng(0).integers(0, 3, 3000).astype(np.float32)
    np.testing.assert_array_equal(top_k_of(row[None], k).ids[0], np.argsort(-row, kind="stable")[:k])


def test_the_best_entries_may_all_stand_in_one_block() -> None:
    row = np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    row[640:704] += 100
    np.testing.assert_array_equal(top_k_of(row[None], 64).ids[0], np.argsort(-row, kind="stable")[:64])


def test_logprobs_are_those_of_float64_down_to_the_last_id() -> None:
    logits = (np.random.default_rng(1).standard_normal((3, 5000)) * 10).astype(np.float32)
    top_k = top_k_of(logits, 5000)
    exact = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1)[:, None]
    np.testing.assert_allclose(
        top_k.logprobs, np.take_along_axis(exact, top_k.ids.astype(int), 1), rtol=1e-6, atol=5e-7
    )
    np.testing.assert_allclose(top_k.label_logprob, exact.diagonal(), rtol=1e-6, atol=5e-7)


def test_a_row_with_all_mass_on_one_id_has_a_logprob_of_exactly_zero() -> None:
    row = np.full(1000, -200, np.float32)
    row[7] = 0
    assert top_k_of(row[None], 1).logprobs[0, 0] == 0


@given(seed=st.integers(0, 2**32 - 1), vocab_size=st.integers(1, 700))
def test_an_id_without_mass_is_never_drawn_not_even_at_the_ends(seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    row = rng.standard_normal(vocab_size).astype(np.float32)
    row[rng.random(vocab_size) < 0.9] = -np.inf
    row[rng.integers(vocab_size)] = 0
    uniforms = np.sort(np.concatenate([[0.0, 1 - 2.0**-53], rng.random(20)]))
    drawn = drawn_from(row, uniforms)
    assert drawn.counts.sum() == 22
    assert np.isfinite(row[drawn.ids]).all()
    assert drawn.ids[0] == np.flatnonzero(np.isfinite(row))[0]
    assert (np.diff(drawn.ids) > 0).all()


def test_a_row_that_is_no_distribution_is_drawn_nothing_from() -> None:
    drawn = drawn_from(np.array([0, np.nan, 1], np.float32), np.array([0.1, 0.5]))
    assert drawn.lengths.tolist() == [0]
    assert not len(drawn.ids)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"labels": np.array([3])}, "labels from 3 to 3"),
        ({"labels": np.array([-1])}, "labels from -1"),
        ({"labels": np.array([], np.int64)}, r"labels \(0,\)"),
        ({"ids": np.empty((2, 1), np.int32)}, r"ids \(2, 1\)"),
        ({"ids": np.empty((1, 4), np.int32), "logprobs": np.empty((1, 4), np.float32)}, "top-4"),
        ({"label_logprob": np.empty(0, np.float32)}, "label_logprob"),
        ({"entropy": np.empty(2, np.float32)}, "entropy"),
        ({"temperatures": np.ones(1)}, "log_z"),
        ({"dense": np.empty((1, 2), np.float32)}, r"dense \(1, 2\)"),
        ({"uniforms": np.empty((2, 1))}, "uniforms"),
    ],
)
def test_what_compiled_code_would_not_notice_is_refused_before_it(wrong: dict[str, Any], says: str) -> None:
    top_k = {"ids": np.empty((1, 1), np.int32), "logprobs": np.empty((1, 1), np.float32), "labels": np.array([2])}
    arrays = nothing_of(1, 3)._replace(**{**top_k, "label_logprob": np.empty(1, np.float32), **wrong})
    with pytest.raises(ValueError, match=says):
        fill(np.zeros((1, 3), np.float32), arrays)


def test_rows_whose_entries_are_not_beside_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="beside each other"):
        top_k_of(np.zeros((4, 6), np.float32)[:, ::2], 1)


@pytest.mark.parametrize("masked", [-np.inf, -3.4e38, -1e9, -1e30])
@pytest.mark.parametrize("num_open", [3, 70, 5000])
def test_few_of_a_masked_vocabulary_are_candidates(masked: float, num_open: int) -> None:
    """Sorting all that is masked would take a hundred times as long."""
    rng = np.random.default_rng(0)
    row = np.full(8192, masked, np.float32)
    row[rng.permutation(8192)[:num_open]] = rng.standard_normal(num_open).astype(np.float32)
    expected = np.argsort(-row, kind="stable")[:64]
    np.testing.assert_array_equal(top_k_of(row[None], 64).ids[0], expected)
    if num_open >= 64:
        assert (row >= _bound(row, 64)).sum() <= 64 + 64 // 16


def test_equal_logits_share_the_mass_however_large_they_are() -> None:
    found = top_k_of(np.full((1, 3), -1e30, np.float32), 3)
    np.testing.assert_allclose(found.logprobs[0], np.log(1 / 3), rtol=1e-6)


def test_a_function_is_compiled_where_no_folder_can_keep_it() -> None:
    """Its source is in no file, as one in a folder that cannot be written is for numba."""
    names: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x", names)
    assert compiled(names["twice"])(21) == 42  # type: ignore[type-var,operator]
