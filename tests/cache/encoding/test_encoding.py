from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from potstill.cache import Targets
from potstill.cache.encoding.logprobs import (
    ENCODINGS,
    RankTable,
    decode,
    encode,
    encoding_by_name,
)
from potstill.cache.errors import FormatError, InvalidInput, TeacherFailed
from tests.support.round_trips import measure_error, round_trip


def targets_from_dense(logits: NDArray[np.float64], k: int) -> Targets:
    """Exact top-k of a dense float64 softmax: what any encoding is held against."""
    dense = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-dense, axis=1, kind="stable")
    top, rest = ids[:, :k], ids[:, k:]
    tail = np.logaddexp.reduce(np.take_along_axis(dense, rest, 1), axis=1, initial=-np.inf)
    return Targets(
        ids=top.astype(np.uint32),
        logprobs=np.take_along_axis(dense, top, 1).astype(np.float32),
        log_tail=np.minimum(tail, 0).astype(np.float32),
        label_logprob=np.where(np.arange(len(dense)) % 5 == 4, np.nan, dense[:, 0]).astype(np.float32),
    )


@st.composite
def random_targets(draw: st.DrawFn) -> Targets:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.integers(2, 300))
    k = draw(st.integers(1, vocab))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 60.0]))
    logits = rng.normal(size=(draw(st.integers(1, 40)), vocab)) * scale
    if draw(st.booleans()):
        logits[:, vocab // 2 + 1 :] = -np.inf
    return targets_from_dense(logits, k)


@given(random_targets(), st.sampled_from(sorted(ENCODINGS)))
def test_what_is_decoded_is_within_the_stated_bound(exact: Targets, name: str) -> None:
    encoding = ENCODINGS[name]
    ranks = RankTable.by_frequency(exact.ids[:3], exact.ids[:, 0], 300)
    decoded = round_trip(exact, encoding, ranks)
    assert np.array_equal(decoded.ids, exact.ids)
    error = measure_error(exact, decoded)
    representable = exact.logprobs > -32.0
    if error.saturated == 0 and representable.all():
        assert error.max_abs <= encoding.max_abs_error
    assert error.mean_kl >= -1e-6
    assert np.array_equal(np.isnan(decoded.label_logprob), np.isnan(exact.label_logprob))


@given(random_targets(), st.sampled_from(["u8", "f16"]))
def test_decoded_mass_is_one(exact: Targets, name: str) -> None:
    decoded = round_trip(exact, ENCODINGS[name], RankTable.plain(300))
    mass = np.exp(decoded.logprobs.astype(np.float64)).sum(1) + np.exp(decoded.log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=1e-6)


@given(random_targets(), st.sampled_from(sorted(ENCODINGS)))
def test_encoding_twice_changes_nothing(exact: Targets, name: str) -> None:
    ranks = RankTable.plain(300)
    once = encode(exact, ENCODINGS[name], ranks)
    again = encode(decode(once, ENCODINGS[name], ranks), ENCODINGS[name], ranks)
    for field in ("ids", "gaps", "log_tail", "label_logprob"):
        if field in once:
            assert np.array_equal(once[field], again[field], equal_nan=field not in {"ids", "gaps"})


@given(random_targets(), st.integers(1, 39))
def test_a_position_decodes_to_the_same_bits_in_any_batch(exact: Targets, cut: int) -> None:
    ranks = RankTable.plain(300)
    whole = round_trip(exact, ENCODINGS["u8"], ranks)
    part = round_trip(exact[: min(cut, exact.num_positions)], ENCODINGS["u8"], ranks)
    assert np.array_equal(whole.logprobs[: part.num_positions], part.logprobs)


def test_f32_keeps_every_bit() -> None:
    exact = targets_from_dense(np.random.default_rng(0).normal(size=(50, 100)) * 4, 20)
    decoded = round_trip(exact, ENCODINGS["f32"], RankTable.plain(100))
    assert np.array_equal(decoded.logprobs, exact.logprobs)
    assert np.array_equal(decoded.log_tail, exact.log_tail)


def test_a_saturated_gap_is_made_up_for_and_reported() -> None:
    logits = np.array([[0.0, -20.0, -20.5, -21.0, -60.0]])
    exact = targets_from_dense(logits, 5)
    decoded = round_trip(exact, ENCODINGS["u8"], RankTable.plain(5))
    drop = decoded.logprobs[0, 0] - decoded.logprobs[0]
    np.testing.assert_allclose(drop[2:4], [20.5, 21.0], atol=1 / 16)
    error = measure_error(exact, decoded)
    assert error.saturated == 2
    assert 0 < error.saturated_mass < 1e-8


def test_entries_without_mass_come_back_next_to_none_and_are_counted() -> None:
    """The bound is of the others; what is said of the error says how many these are."""
    exact = targets_from_dense(np.array([[-0.1, -2.4, -9.6, -np.inf, -np.inf]]), 5)
    decoded = round_trip(exact, ENCODINGS["u8"], RankTable.plain(5))
    np.testing.assert_allclose(decoded.logprobs[0, 3:], [-9.5 - 15.94, -9.5 - 31.88], atol=0.1)
    error = measure_error(exact, decoded)
    assert (error.saturated, error.saturated_mass) == (2, 0.0)
    assert error.max_abs <= ENCODINGS["u8"].max_abs_error
    assert error.mean_kl < 1e-3


def test_a_row_whose_top_k_has_no_mass_at_all_comes_back_with_next_to_none() -> None:
    """A projection can leave such a row; it must not make the error of all others infinite."""
    whole = targets_from_dense(np.random.default_rng(0).normal(size=(2, 9)), 3)
    logprobs, log_tail = whole.logprobs.copy(), whole.log_tail.copy()
    logprobs[1], log_tail[1] = -np.inf, 0.0
    exact = replace(whole, logprobs=logprobs, log_tail=log_tail)
    decoded = round_trip(exact, ENCODINGS["u8"], RankTable.plain(9))
    assert np.exp(decoded.logprobs[1]).sum() < 1e-7
    error = measure_error(exact, decoded)
    assert (error.saturated, error.saturated_mass) == (3, 0.0)
    assert error.max_abs <= ENCODINGS["u8"].max_abs_error


def test_the_whole_vocabulary_has_no_tail() -> None:
    exact = targets_from_dense(np.random.default_rng(1).normal(size=(4, 9)), 9)
    assert np.isneginf(exact.log_tail).all()
    assert np.isneginf(round_trip(exact, ENCODINGS["u8"], RankTable.plain(9)).log_tail).all()


def test_k_of_one_stores_no_gap() -> None:
    exact = targets_from_dense(np.random.default_rng(2).normal(size=(6, 9)), 1)
    np.testing.assert_allclose(
        round_trip(exact, ENCODINGS["u8"], RankTable.plain(9)).logprobs, exact.logprobs, atol=1e-3
    )


def test_rank_tables_are_permutations_by_frequency() -> None:
    ranks = RankTable.by_frequency(np.array([[7, 3], [7, 2]], np.uint32), np.array([2, 2, 5], np.uint32), 9)
    assert ranks.ids_by_rank[:4].tolist() == [7, 2, 3, 5]
    assert sorted(ranks.ids_by_rank.tolist()) == list(range(9))
    assert np.array_equal(ranks.ids_by_rank[ranks.ranks_by_id], np.arange(9))


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_an_id_twice_at_a_position_is_not_kept(name: str) -> None:
    good = targets_from_dense(np.random.default_rng(4).normal(size=(3, 9)), 5)
    ids = good.ids.copy()
    ids[2, 4] = ids[2, 1]
    with pytest.raises(TeacherFailed, match=f"id {ids[2, 1]} twice at a position"):
        round_trip(replace(good, ids=ids), ENCODINGS[name], RankTable.plain(9))


def test_what_no_teacher_can_mean_is_not_kept() -> None:
    good = targets_from_dense(np.random.default_rng(3).normal(size=(2, 9)), 4)
    ranks = RankTable.plain(9)
    nan = Targets(
        ids=good.ids, logprobs=good.logprobs * np.nan, log_tail=good.log_tail, label_logprob=good.label_logprob
    )
    unsorted = Targets(
        ids=good.ids, logprobs=good.logprobs[:, ::-1], log_tail=good.log_tail, label_logprob=good.label_logprob
    )
    heavy = Targets(ids=good.ids, logprobs=good.logprobs + 1, log_tail=good.log_tail, label_logprob=good.label_logprob)
    surer = replace(good, label_logprob=np.array([np.nan, 0.01], np.float32))
    for broken in (nan, unsorted, heavy, surer):
        with pytest.raises(TeacherFailed):
            encode(broken, ENCODINGS["u8"], ranks)
    with pytest.raises(TeacherFailed, match="vocabulary has 3"):
        encode(good, ENCODINGS["u8"], RankTable.plain(3))


@pytest.mark.parametrize("name", ["u8", "f16", "f32"])
def test_mass_a_little_over_1_is_kept_as_all_of_it(name: str) -> None:
    """As a teacher rounds; readers refuse a tail above 0."""
    sure = Targets(
        ids=np.array([[1]], np.uint32),
        logprobs=np.array([[-20.0]], np.float32),
        log_tail=np.array([1e-6], np.float32),
        label_logprob=np.array([1e-6], np.float32),
    )
    kept = round_trip(sure, ENCODINGS[name], RankTable.plain(9))
    assert kept.log_tail[0] <= 0
    assert kept.label_logprob[0] <= 0


def test_a_stored_rank_over_the_vocabulary_is_refused() -> None:
    exact = targets_from_dense(np.random.default_rng(4).normal(size=(2, 9)), 4)
    stored = encode(exact, ENCODINGS["u8"], RankTable.plain(9))
    with pytest.raises(FormatError, match="vocabulary has 2"):
        decode(stored, ENCODINGS["u8"], RankTable.plain(2))


def test_an_unknown_encoding_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="'u4' is unknown; known are u8, archive, f16, f32"):
        encoding_by_name("u4")
