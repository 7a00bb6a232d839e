from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import stats

from potstill.cache.encoding.draws import MAX_DRAWS, check_num_draws, draw_rows, uniforms
from potstill.cache.encoding.fields import (
    BLOCK_POSITIONS,
    RAGGED,
    check_fields,
    decode_fields,
    encode_fields,
    ragged_length,
    stored_shapes,
)
from potstill.cache.encoding.logprobs import ENCODINGS, RankTable, StoredArrays
from potstill.cache.errors import FormatError, InvalidInput, LimitExceeded, PotstillError, TeacherFailed
from potstill.cache.types import Draws, Fields, Targets
from tests.support.round_trips import round_trip_fields

U8, F16, F32 = (ENCODINGS[name] for name in ("u8", "f16", "f32"))
ALL = Fields(k=0, draws=7, entropy=True, temperatures=(0.5, 2.0), dense=True)


def shuffled_ranks(vocab_size: int) -> RankTable:
    return RankTable(np.random.default_rng(vocab_size).permutation(vocab_size).astype(np.uint32))


def distributions(seed: int, num_positions: int, vocab_size: int, sharpness: float = 3.0) -> np.ndarray:
    """[P, V] float64 logprobs."""
    logits = np.random.default_rng(seed).normal(size=(num_positions, vocab_size)) * sharpness
    logprobs: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs


def everything(dense: np.ndarray, fields: Fields) -> Targets:
    """All that `fields` names, computed plainly in float64."""
    columns = [np.logaddexp.reduce(dense / t, axis=1) for t in fields.temperatures]
    return Targets.of_other_fields(
        len(dense),
        entropy=-(np.exp(dense) * dense).sum(axis=1).astype(np.float32),
        log_z=np.stack(columns, axis=1).astype(np.float32) if columns else None,
        dense=dense.astype(np.float32),
        draws=draw_rows(dense, fields.draws, fields.seed, b"row") if fields.draws else None,
    )


def random_draws(seed: int, num_positions: int, n: int, vocab_size: int) -> Draws:
    """Cheap draws for large vocabularies: uniform ids."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, (num_positions, n))
    parts = [np.unique(row, return_counts=True) for row in drawn]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64)
    ids, counts = (np.concatenate([np.empty(0, int), *(part[i] for part in parts)]) for i in (0, 1))
    return Draws(offsets, ids.astype(np.uint32), counts.astype(np.uint16))


def assert_same_draws(left: Draws | None, right: Draws | None) -> None:
    assert left is not None
    assert right is not None
    for name in ("offsets", "ids", "counts"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def reader(stored: StoredArrays) -> Callable[[str, int, int], np.ndarray]:
    return lambda name, start, stop: stored[name][start:stop]


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_positions=st.integers(0, 40),
    n=st.sampled_from([1, 2, 50, 255, 256, 65_535]),
    vocab_size=st.sampled_from([1, 2, 64, 65_536, 65_537, 262_144]),
)
@example(seed=0, num_positions=3, n=50, vocab_size=1)  # all draws equal
@example(seed=0, num_positions=3, n=1, vocab_size=262_144)
def test_draws_are_kept_exactly_in_the_narrowest_types(seed: int, num_positions: int, n: int, vocab_size: int) -> None:
    num_positions = min(num_positions, 200_000 // n)
    fields, ranks = Fields(k=0, draws=n), shuffled_ranks(vocab_size)
    draws = random_draws(seed, num_positions, n, vocab_size)
    stored = encode_fields(Targets.of_other_fields(num_positions, draws=draws), fields, U8, ranks)
    shapes = stored_shapes(fields, U8, num_positions, vocab_size)
    assert set(stored) == set(shapes)
    assert ragged_length(stored["draw_starts"], fields, num_positions) == len(draws.ids)
    for name, array in stored.items():
        assert array.dtype == shapes[name].dtype, name
        assert array.shape == tuple(len(draws.ids) if n == RAGGED else n for n in shapes[name].shape), name
    back = decode_fields(reader(stored), range(num_positions), fields, U8, ranks, num_positions)
    assert_same_draws(back.draws, draws)


LONG = 2 * BLOCK_POSITIONS + 77


@functools.cache
def stored_draws() -> tuple[Draws, StoredArrays]:
    """Draws of `LONG` positions, and the arrays that keep them."""
    draws = random_draws(1, LONG, 3, 100)
    fields = Fields(k=0, draws=3)
    return draws, encode_fields(Targets.of_other_fields(LONG, draws=draws), fields, U8, shuffled_ranks(100))


@settings(deadline=None, max_examples=40)
@given(bounds=st.tuples(st.integers(0, LONG), st.integers(0, LONG)).map(sorted))
@example(bounds=[0, LONG])
@example(bounds=[BLOCK_POSITIONS, 2 * BLOCK_POSITIONS])
def test_a_range_of_draws_touches_only_its_blocks(bounds: list[int]) -> None:
    start, stop = bounds
    fields, ranks = Fields(k=0, draws=3), shuffled_ranks(100)
    draws, stored = stored_draws()
    touched: list[tuple[str, int, int]] = []

    def read(name: str, a: int, b: int) -> np.ndarray:
        touched.append((name, a, b))
        return stored[name][a:b]

    back = decode_fields(read, range(start, stop), fields, U8, ranks, LONG)
    assert_same_draws(back.draws, draws[start:stop])
    first, last = start // BLOCK_POSITIONS * BLOCK_POSITIONS, -(-stop // BLOCK_POSITIONS) * BLOCK_POSITIONS
    span = draws.offsets[first], draws.offsets[min(last, LONG)]
    assert all(span[0] <= a <= b <= span[1] for name, a, b in touched if name != "draw_starts")
    assert bool(touched) == (start < stop)


def test_more_positions_than_are_sorted_at_once_are_one_array() -> None:
    num_positions = 2**16 + 5
    fields, ranks = Fields(k=0, draws=2), shuffled_ranks(9)
    draws = random_draws(2, num_positions, 2, 9)
    targets = Targets.of_other_fields(num_positions, draws=draws)
    assert_same_draws(round_trip_fields(targets, fields, U8, ranks).draws, draws)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    num_positions=st.integers(0, 9),
    vocab_size=st.sampled_from([1, 2, 7, 300]),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    temperatures=st.lists(st.sampled_from([0.05, 0.5, 1.0, 2.0, 100.0]), max_size=3).map(tuple),
    name=st.sampled_from(sorted(set(ENCODINGS) & {"u8", "f16", "f32"})),
)
def test_every_field_decodes_within_its_bound(
    seed: int, num_positions: int, vocab_size: int, sharpness: float, temperatures: tuple[float, ...], name: str
) -> None:
    fields = Fields(k=0, entropy=True, temperatures=temperatures, dense=True, draws=3)
    exact = everything(distributions(seed, num_positions, vocab_size, sharpness), fields)
    back = round_trip_fields(exact, fields, ENCODINGS[name], shuffled_ranks(vocab_size))
    assert_same_draws(back.draws, exact.draws)
    bounds = {"entropy": 0.004, "log_z": 0.004, "dense": 0.016}
    for field, bound in bounds.items():
        a, b = getattr(exact, field), getattr(back, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert b.dtype == np.float32
            kept = a > -32 if field == "dense" else np.isfinite(a)
            assert np.abs(a[kept] - b[kept]).max(initial=0.0) <= (0.0 if name == "f32" else bound), field
    check_fields(back, replace(fields, draws=0), vocab_size)  # what is read can be handed in again
    assert back.dense is not None
    np.testing.assert_allclose(np.exp(back.dense.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)


def test_a_dense_row_of_a_large_vocabulary_still_sums_to_one() -> None:
    flat = np.full((3, 262_144), -np.log(262_144))
    fields = Fields(k=0, dense=True)
    back = round_trip_fields(
        Targets.of_other_fields(3, dense=flat.astype(np.float32)), fields, U8, RankTable.plain(262_144)
    )
    assert back.dense is not None
    np.testing.assert_allclose(np.exp(back.dense.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)


def test_an_id_without_mass_stays_without_in_dense() -> None:
    with np.errstate(divide="ignore"):
        dense = np.log(np.array([[0.5, 0.5, 0.0]], np.float32))
    back = round_trip_fields(Targets.of_other_fields(1, dense=dense), Fields(k=0, dense=True), U8, RankTable.plain(3))
    assert back.dense is not None
    assert np.isneginf(back.dense[0, 2])


def test_only_what_the_fields_name_is_stored() -> None:
    exact = everything(distributions(0, 5, 20), ALL)
    for fields in (Fields(k=0, entropy=True), Fields(k=3, temperatures=(0.5, 2.0)), Fields(k=0, draws=7)):
        wanted = replace(exact, log_z=exact.log_z if fields.temperatures else None)
        stored = encode_fields(wanted, fields, F16, RankTable.plain(20))
        assert set(stored) == set(stored_shapes(fields, F16, 5, 20))


def broken(**changes: Any) -> Targets:
    return replace(everything(distributions(0, 4, 20), ALL), **changes)


def draws_of(offsets: list[int], ids: list[int], counts: list[int]) -> Draws:
    return Draws(np.array(offsets, np.int64), np.array(ids, np.uint32), np.array(counts, np.uint16))


GOOD_DENSE = distributions(0, 4, 20).astype(np.float32)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (broken(entropy=None, draws=None), "left out draws, entropy"),
        (broken(entropy=np.full(4, np.nan, np.float32)), "entropy"),
        (broken(entropy=np.full(4, 3.1, np.float32)), "entropy"),
        (broken(entropy=np.full(4, -0.1, np.float32)), "entropy"),
        (broken(log_z=np.full((4, 2), np.inf, np.float32)), "temperature 0.5"),
        (broken(log_z=np.full((4, 2), -1.0, np.float32)), "temperature 2.0"),
        (broken(log_z=np.zeros((4, 1), np.float32)), "log_z.*2"),
        (broken(dense=GOOD_DENSE + 0.01), "dense"),
        (broken(dense=np.where(GOOD_DENSE < -5, np.nan, GOOD_DENSE).astype(np.float32)), "dense"),
        (broken(dense=GOOD_DENSE[:, :19]), "dense.*20"),
        (broken(draws=draws_of([0, 1, 2, 3, 3], [0, 0, 0], [7, 7, 7])), "without draws"),
        (broken(draws=draws_of([0, 1, 2, 3, 4], [0] * 4, [7, 7, 6, 7])), "6 draws.*7"),
        (broken(draws=draws_of([0, 1, 2, 3, 5], [0, 0, 0, 0, 1], [7, 7, 7, 7, 0])), "draws"),
        (broken(draws=draws_of([0, 1, 2, 3, 5], [0, 0, 0, 1, 1], [7, 7, 7, 3, 4])), "rise"),
        (broken(draws=draws_of([0, 1, 2, 3, 4], [0, 0, 0, 20], [7] * 4)), "id 20.*20"),
        (broken(draws=draws_of([0, 2, 1, 3, 4], [0, 1, 0, 0], [3, 4, 7, 7])), "draws"),
    ],
)
def test_what_no_teacher_can_mean_is_refused(targets: Targets, words: str) -> None:
    check_fields(broken(), ALL, 20)
    with pytest.raises(TeacherFailed, match=words):
        encode_fields(targets, ALL, U8, RankTable.plain(20))


def test_draws_that_no_count_can_hold_are_refused() -> None:
    with pytest.raises(InvalidInput, match=str(MAX_DRAWS)):
        Fields(k=0, draws=MAX_DRAWS + 1)
    with pytest.raises(LimitExceeded, match=str(MAX_DRAWS)):
        check_num_draws(MAX_DRAWS + 1)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_changed_stored_arrays_are_found_or_decode_to_possible_targets(data: st.DataObject) -> None:
    exact = everything(distributions(3, 6, 20), ALL)
    stored = encode_fields(exact, ALL, U8, shuffled_ranks(20))
    name = data.draw(st.sampled_from(sorted(stored)))
    raw = bytearray(stored[name].tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    array = np.frombuffer(bytes(raw), stored[name].dtype).reshape(stored[name].shape)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            back = decode_fields(reader({**stored, name: array}), range(6), ALL, U8, shuffled_ranks(20), 6)
    except FormatError:
        return
    check = replace(ALL, entropy=False, temperatures=(), dense=False)
    check_fields(back, check, 20)


@pytest.mark.parametrize("starts", [[0, 0], [1, 12], [0, 5], [0, 43], [0, -1], [0, 2**40]])
def test_draw_starts_that_lie_are_found_before_anything_is_read(starts: list[int]) -> None:
    with pytest.raises(FormatError, match="draw_starts"):
        ragged_length(np.array(starts, np.int64), ALL, 6)


def test_arrays_shorter_than_their_starts_are_found() -> None:
    exact = everything(distributions(3, 6, 20), ALL)
    stored = encode_fields(exact, ALL, U8, shuffled_ranks(20))
    for name in ("draw_gaps", "draw_counts"):
        cut = {**stored, name: stored[name][:-1]}
        with pytest.raises(PotstillError, match="draw"):
            decode_fields(reader(cut), range(6), ALL, U8, shuffled_ranks(20), 6)


def test_draws_follow_the_distribution_and_the_seed_and_row_decide_them() -> None:
    logprobs = np.repeat(distributions(5, 1, 12, 1.0), 400, axis=0)
    draws = draw_rows(logprobs, 50, 7, b"a row")
    drawn = np.bincount(draws.ids, weights=draws.counts, minlength=12)
    expected = np.exp(logprobs[0]) * drawn.sum()
    assert stats.chisquare(drawn, expected).pvalue > 1e-3
    assert_same_draws(draws, draw_rows(logprobs, 50, 7, b"a row"))
    for other in (draw_rows(logprobs, 50, 8, b"a row"), draw_rows(logprobs, 50, 7, b"b row")):
        assert not np.array_equal(other.ids, draws.ids)
    check_fields(Targets.of_other_fields(400, draws=draws), Fields(k=0, draws=50), 12)


def test_the_stream_of_draws_never_changes() -> None:
    got = uniforms(2, 2, 7, b"a row")
    np.testing.assert_array_equal(got, STREAM)


def test_an_id_without_mass_is_never_drawn() -> None:
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]))
    draws = draw_rows(logprobs, 5000, 0, b"")
    assert draws[0:1].ids.tolist() == [1]
    assert draws[1:2].ids.tolist() == [0, 2]


def test_nothing_is_drawn_from_what_is_no_distribution() -> None:
    for logprobs in (np.full((1, 4), np.nan), np.full((1, 4), 1.0)):
        with pytest.raises(TeacherFailed):
            draw_rows(logprobs, 5, 0, b"")
    with pytest.raises(LimitExceeded):
        draw_rows(np.zeros((1, 1)), 0, 0, b"")


STREAM = [[0.691379508190302, 0.32127117339908007], [0.5677333625138988, 0.4783654180012741]]
