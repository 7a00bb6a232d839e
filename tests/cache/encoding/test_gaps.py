from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from potstill.cache.encoding.gaps import COMPILED_ENTRIES, LOADED_ENTRIES, STEP, decode_gaps, log1mexp
from potstill.cache.encoding.logprobs import RankTable, decode, encoding_by_name


def some_gaps(num_positions: int, num_gaps: int) -> NDArray[np.uint8]:
    """Small ones, and positions where all of them saturate."""
    rng = np.random.default_rng(num_gaps)
    gaps = np.minimum(rng.geometric(0.2, (num_positions, num_gaps)) - 1, 255).astype(np.uint8)
    gaps[::97] = 255
    return gaps


@pytest.mark.parametrize("num_gaps", [1, 7, 63, 255])
def test_many_positions_decode_to_the_bits_of_few(num_gaps: int) -> None:
    gaps = some_gaps(COMPILED_ENTRIES // num_gaps + 1, num_gaps)
    kept = np.log(np.random.default_rng(0).uniform(1e-6, 1.0, len(gaps)))
    few = (LOADED_ENTRIES - 1) // (num_gaps + 1)
    whole = decode_gaps(gaps, kept)
    parts = [decode_gaps(gaps[at : at + few], kept[at : at + few]) for at in range(0, len(gaps), few)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("num_positions", [3, COMPILED_ENTRIES // 63 + 1])
def test_decoded_logprobs_are_those_of_float64(num_positions: int) -> None:
    gaps = some_gaps(num_positions, 63)
    kept = np.log(np.random.default_rng(0).uniform(1e-6, 1.0, num_positions))
    down = np.pad(gaps.astype(np.float64).cumsum(axis=1), ((0, 0), (1, 0))) * STEP
    exact = kept[:, None] - np.log(np.exp(-down).sum(axis=1, keepdims=True)) - down
    np.testing.assert_allclose(decode_gaps(gaps, kept), exact, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [">u2", "i4", "u1"])
def test_codes_of_any_kind_are_looked_up_however_many(dtype: str) -> None:
    ranks = RankTable.plain(200)
    codes = np.random.default_rng(0).integers(0, 100, (COMPILED_ENTRIES // 8, 8)).astype(dtype)
    every = np.zeros(len(codes), np.float16)
    stored = {"ids": codes, "gaps": some_gaps(len(codes), 7), "log_tail": every - 3, "label_logprob": every - 1}
    np.testing.assert_array_equal(decode(stored, encoding_by_name("u8"), ranks).ids, codes)


def test_ids_of_many_positions_are_looked_up_like_those_of_few() -> None:
    rng = np.random.default_rng(0)
    ranks = RankTable.by_frequency(rng.integers(0, 70_000, (999, 8)).astype(np.uint32), np.zeros(0, np.uint32), 70_000)
    count = COMPILED_ENTRIES // 8
    stored = {
        "ids": rng.integers(0, 70_000, (count, 8)).astype(ranks.dtype),
        "gaps": some_gaps(count, 7),
        "log_tail": np.full(count, -3.0, np.float16),
        "label_logprob": np.full(count, -1.0, np.float16),
    }
    encoding = encoding_by_name("u8")
    few = {name: array[:100] for name, array in stored.items()}
    for k in (8, 3):
        whole = decode(stored, encoding, ranks, k=k)
        np.testing.assert_array_equal(whole.logprobs[:100], decode(few, encoding, ranks, k=k).logprobs)
        np.testing.assert_array_equal(whole.ids, ranks.ids_by_rank[stored["ids"][:, :k]])


def test_log1mexp_holds_at_both_ends() -> None:
    x = np.array([-1e-12, -1e-3, -0.6, -0.7, -50.0, -np.inf])
    expected = [
        np.log(1e-12),
        np.log(-np.expm1(-1e-3)),
        np.log(1 - np.exp(-0.6)),
        np.log(1 - np.exp(-0.7)),
        -np.exp(-50.0),
        0,
    ]
    np.testing.assert_allclose(log1mexp(x), expected, rtol=1e-9)
