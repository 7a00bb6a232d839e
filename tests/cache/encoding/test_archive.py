from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from potstill.cache.encoding.archive.blocks import NO_LABEL, Context, checksum
from potstill.cache.encoding.archive.codec import pack_draws, pack_top_k, unpack_draws, unpack_top_k
from potstill.cache.encoding.archive.codes import DrawCodes, TopKCodes, canonical, canonical_draws
from potstill.cache.errors import FormatError, InvalidInput

HEADER = 20


def context_of(rng: np.random.Generator, positions: int, vocab: int) -> Context:
    tokens = rng.integers(0, min(vocab, 7), positions).astype(np.uint32)
    begins = rng.random(positions) < 0.1
    ends = np.append(begins[1:], np.ones(min(positions, 1), dtype=bool))
    labels = np.where(ends, NO_LABEL, np.roll(tokens, -1)).astype(np.uint32)
    return Context(tokens, labels, begins)


def codes_of(rng: np.random.Generator, context: Context, vocab: int, k: int, width: float) -> TopKCodes:
    """Top-k of noise around a distribution that depends on the token, so that there is something to learn."""
    positions = len(context.tokens)
    near = rng.integers(0, 50, (positions, min(vocab, 40 * k))) + 13 * context.tokens[:, None].astype(np.int64)
    ids = np.argsort(near, axis=1)[:, :k]
    gaps = np.minimum(rng.exponential(width, (positions, k - 1)), 255)
    return TopKCodes(
        ids=(ids * max(vocab // (40 * k), 1)).astype(np.uint32),
        gaps=gaps.astype(np.uint8),
        log_tail=-rng.exponential(3, positions).astype(np.float16),
        label_logprob=np.where(context.labels == NO_LABEL, np.nan, -rng.exponential(4, positions)).astype(np.float16),
        label_entry=np.full(positions, -1, dtype=np.int16),
    )


def draws_of(rng: np.random.Generator, positions: int, vocab: int, draws: int) -> DrawCodes:
    drawn = [np.unique(rng.zipf(1.5, draws) % vocab, return_counts=True) for _ in range(positions)]
    return DrawCodes(
        lengths=np.array([len(ids) for ids, _ in drawn], dtype=np.uint16),
        ids=np.array([i for ids, _ in drawn for i in ids], dtype=np.uint32),
        counts=np.array([i for _, counts in drawn for i in counts], dtype=np.uint16),
    )


def assert_same(one: TopKCodes | DrawCodes, other: TopKCodes | DrawCodes) -> None:
    for name in type(one).__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[TopKCodes, Context, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 300, 4097, 262_144, 300_001]))
    k = min(draw(st.sampled_from([1, 2, 3, 8, 9, 40, 200])), vocab)
    context = context_of(rng, draw(st.sampled_from([0, 1, 2, 17, 60])), vocab)
    codes = codes_of(rng, context, vocab, k, draw(st.sampled_from([0.0, 0.5, 2.0, 40.0, 1e4])))
    if draw(st.booleans()):
        odd = np.array([-np.inf, -6e-8, -65504.0, 0.0, -1.0, -2.0, -32.0], dtype=np.float16)
        codes.log_tail[:] = rng.choice(odd, len(codes.ids))
        codes.label_logprob[:] = rng.choice(np.append(odd, np.float16(np.nan)), len(codes.ids))
    return codes, context, vocab


@given(blocks())
def test_a_block_unpacks_to_its_canonical_form(block: tuple[TopKCodes, Context, int]) -> None:
    codes, context, vocab = block
    data = pack_top_k(codes, context, vocab)
    expected = canonical(codes, context)
    read = unpack_top_k(data, context, codes.ids.shape[1], vocab)
    assert_same(read, expected)
    again = canonical(read, context)
    for name in ("ids", "gaps", "log_tail"):
        np.testing.assert_array_equal(getattr(again, name), getattr(read, name))


@given(blocks())
def test_the_canonical_form_is_within_the_bound(block: tuple[TopKCodes, Context, int]) -> None:
    codes, context, _ = block
    kept = canonical(codes, context)
    group = np.cumsum(np.pad(codes.gaps > 0, ((0, 0), (1, 0))), axis=1).astype(np.int64)
    assert np.array_equal(np.sort(group << 32 | codes.ids), np.sort(group << 32 | kept.ids))
    assert np.array_equal(kept.gaps, codes.gaps)
    before, after = codes.log_tail.astype(np.float64), kept.log_tail.astype(np.float64)
    finite = np.isfinite(before)
    assert np.array_equal(before[~finite], after[~finite])
    before, after = before[finite], after[finite]
    assert (np.abs(before - after) <= 1 / 64).all()
    some = (before < -1e-3) & (after < -1e-3)
    top_shift = np.log1p(-np.exp(before[some])) - np.log1p(-np.exp(after[some]))
    assert (np.abs(top_shift) <= 0.001).all()
    apart = kept.label_entry < 0
    label = codes.label_logprob[apart].astype(np.float64)
    known = np.isfinite(label)
    error = np.abs(label[known] - kept.label_logprob[apart][known].astype(np.float64))
    assert (error <= 1 / 32 + np.abs(label[known]) / 1024).all()
    assert np.isnan(kept.label_logprob[~apart]).all()


def test_a_label_that_is_an_entry_costs_a_pointer_and_one_that_is_far_off_keeps_its_value() -> None:
    context = Context(
        tokens=np.array([3, 5], dtype=np.uint32),
        labels=np.array([5, 2], dtype=np.uint32),
        begins_row=np.array([True, False]),
    )
    entry_logprob = np.log1p(-np.exp(-2.0)) - np.log1p(np.exp(-1.0)) - 1.0
    codes = TopKCodes(
        ids=np.array([[4, 5], [1, 2]], dtype=np.uint32),
        gaps=np.array([[16], [16]], dtype=np.uint8),
        log_tail=np.array([-2.0, -2.0], dtype=np.float16),
        label_logprob=np.array([entry_logprob + 0.03, -9.0], dtype=np.float16),
        label_entry=np.array([-1, -1], dtype=np.int16),
    )
    read = unpack_top_k(pack_top_k(codes, context, 6), context, 2, 6)
    assert read.label_entry.tolist() == [1, -1]
    assert np.isnan(read.label_logprob[0])
    assert read.label_logprob[1] == -9.0


def test_what_repeats_with_the_corpus_becomes_small() -> None:
    rng = np.random.default_rng(0)
    context = context_of(rng, 2000, 50_000)
    of_token = np.stack([rng.choice(50_000, 32, replace=False) for _ in range(7)])
    codes = TopKCodes(
        ids=of_token[context.tokens].astype(np.uint32),
        gaps=np.ones((2000, 31), dtype=np.uint8),
        log_tail=np.full(2000, -3.0, dtype=np.float16),
        label_logprob=np.full(2000, np.nan, dtype=np.float16),
        label_entry=np.full(2000, -1, dtype=np.int16),
    )
    assert len(pack_top_k(codes, context, 50_000)) / 2000 < 16


@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 30]),
    st.sampled_from([1, 2, 70, 40_000]),
    st.sampled_from([1, 2, 50, 700]),
)
def test_draws_come_back_exactly(seed: int, positions: int, vocab: int, draws: int) -> None:
    rng = np.random.default_rng(seed)
    context, codes = context_of(rng, positions, vocab), draws_of(rng, positions, vocab, draws)
    data = pack_draws(codes, context, draws, vocab)
    read = unpack_draws(data, context, draws, vocab)
    assert_same(read, canonical_draws(codes))
    assert pack_draws(read, context, draws, vocab) == data


def resealed(data: bytes, context: Context) -> bytes:
    """With a checksum that is right, so that the decoder itself meets the damage."""
    return data[: HEADER - 4] + struct.pack("<I", checksum(context, data[HEADER:])) + data[HEADER:]


def example() -> tuple[bytes, bytes, Context]:
    rng = np.random.default_rng(1)
    context = context_of(rng, 40, 3000)
    packed = pack_top_k(codes_of(rng, context, 3000, 12, 1.0), context, 3000)
    return packed, pack_draws(draws_of(rng, 40, 3000, 50), context, 50, 3000), context


def read_or_refuse(data: bytes, context: Context) -> None:
    try:
        codes = unpack_top_k(data, context, 12, 3000)
    except FormatError:
        return
    assert codes.ids.shape == (40, 12)
    assert int(codes.ids.max()) < 3000
    ordered = np.sort(codes.ids, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


def read_draws_or_refuse(data: bytes, context: Context) -> None:
    try:
        codes = unpack_draws(data, context, 50, 3000)
    except FormatError:
        return
    assert len(codes.ids) == len(codes.counts) == codes.lengths.sum()
    assert int(codes.ids.max()) < 3000
    assert codes.counts.sum() == 40 * 50


def test_every_flipped_byte_is_found() -> None:
    packed, drawn, context = example()
    for at in range(len(packed)):
        with pytest.raises(FormatError):
            unpack_top_k(packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :], context, 12, 3000)
    for at in range(len(drawn)):
        with pytest.raises(FormatError):
            unpack_draws(drawn[:at] + bytes([drawn[at] ^ 0x10]) + drawn[at + 1 :], context, 50, 3000)


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_damage_under_a_rightchecksum_is_refused_or_reads_as_a_block(seed: int, times: int) -> None:
    rng = np.random.default_rng(seed)
    *blocks_, context = example()
    for data, read in zip(blocks_, (read_or_refuse, read_draws_or_refuse), strict=True):
        damaged = bytearray(data)
        for _ in range(times):
            damaged[rng.integers(HEADER, len(data))] = rng.integers(256)
        read(resealed(bytes(damaged), context), context)
        cut = HEADER + 8 + 4 * int(rng.integers(0, (len(data) - HEADER) // 4 - 1))
        read(resealed(bytes(damaged[:cut]), context), context)


@given(st.binary(min_size=8, max_size=400), st.sampled_from([b"", b"\xff" * 400, b"\0" * 400]))
def test_any_words_are_refused_or_read_as_a_block(noise: bytes, more: bytes) -> None:
    packed, drawn, context = example()
    body = (noise + more)[: (len(noise + more)) // 4 * 4]
    read_or_refuse(resealed(packed[:HEADER] + body, context), context)
    read_draws_or_refuse(resealed(drawn[:HEADER] + body, context), context)


@given(st.binary(max_size=100))
def test_any_bytes_are_refused(data: bytes) -> None:
    _, _, context = example()
    with pytest.raises(FormatError):
        unpack_top_k(data, context, 12, 3000)
    with pytest.raises(FormatError):
        unpack_draws(data, context, 50, 3000)


def test_a_cut_or_a_longer_block_is_refused() -> None:
    packed, drawn, context = example()
    for data, unpack, k in ((packed, unpack_top_k, 12), (drawn, unpack_draws, 50)):
        for size in range(0, len(data), 3):
            with pytest.raises(FormatError):
                unpack(data[:size], context, k, 3000)
        with pytest.raises(FormatError, match="do not decode"):
            unpack(resealed(data + b"\0\0\0\0", context), context, k, 3000)


def test_a_block_of_other_positions_fields_or_corpus_is_refused() -> None:
    packed, drawn, context = example()
    with pytest.raises(FormatError, match="expected are"):
        unpack_top_k(packed, context, 13, 3000)
    with pytest.raises(FormatError, match="expected are"):
        unpack_top_k(packed, context, 12, 3001)
    with pytest.raises(FormatError, match="expected are"):
        unpack_top_k(drawn, context, 50, 3000)
    other = Context(context.tokens[::-1].copy(), context.labels, context.begins_row)
    with pytest.raises(FormatError, match="not what was written"):
        unpack_top_k(packed, other, 12, 3000)
    later = packed[:2] + b"\x02" + packed[3:]
    with pytest.raises(FormatError, match="this version reads"):
        unpack_top_k(later, context, 12, 3000)


def changed(codes: TopKCodes, name: str, value: NDArray[np.generic]) -> TopKCodes:
    arrays = {field: getattr(codes, field) for field in TopKCodes.__dataclass_fields__}
    return TopKCodes(**{**arrays, name: value})


def test_codes_that_no_teacher_means_are_refused() -> None:
    rng = np.random.default_rng(2)
    context = context_of(rng, 4, 100)
    codes = codes_of(rng, context, 100, 3, 1.0)
    wrong = [
        changed(codes, "ids", np.full((4, 3), 7, dtype=np.uint32)),
        changed(codes, "ids", codes.ids + np.uint32(100)),
        changed(codes, "gaps", codes.gaps[:, :1]),
        changed(codes, "log_tail", np.full(4, np.nan, dtype=np.float16)),
        changed(codes, "log_tail", np.full(4, 0.5, dtype=np.float16)),
        changed(codes, "label_logprob", np.full(4, 0.5, dtype=np.float16)),
    ]
    for bad in wrong:
        with pytest.raises(InvalidInput):
            pack_top_k(bad, context, 100)
    with pytest.raises(InvalidInput, match="the vocabulary has 2"):
        pack_top_k(codes, context, 2)


def test_draws_that_do_not_add_up_are_refused() -> None:
    rng = np.random.default_rng(3)
    context, codes = context_of(rng, 4, 100), draws_of(rng, 4, 100, 50)
    with pytest.raises(InvalidInput, match="sum to 49"):
        pack_draws(codes, context, 49, 100)
    twice = DrawCodes(np.full(4, 2, np.uint16), np.full(8, 5, np.uint32), np.full(8, 25, np.uint16))
    with pytest.raises(InvalidInput, match="twice"):
        pack_draws(twice, context, 50, 100)
    with pytest.raises(InvalidInput, match="draws of a position"):
        pack_draws(codes, context, 5000, 100)
