from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import TeacherFailed
from cache.types import Targets
from teacher_service.capture import TAIL_FLOOR, FlatEntries, log_tail, targets_from_flat

VOCAB = 11


def dense_logprobs(tokens: list[int], seed: int = 0, *, vocab: int = VOCAB) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(len(tokens), vocab)) * 2
    return np.asarray((logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32))


def flat_entries(dense: np.ndarray, firsts: list[int], k: int) -> FlatEntries:
    """What vLLM's FlatLogprobs holds: per position the given token, then the top-k."""
    ids: list[int] = []
    logprobs: list[float] = []
    for row, first in zip(dense, firsts, strict=True):
        top = np.argsort(-row, kind="stable")[:k]
        ids += [first, *top.tolist()]
        logprobs += [float(row[first]), *row[top].tolist()]
    return FlatEntries(ids=ids, logprobs=logprobs)


def capture(tokens: list[int], dense: np.ndarray, *, k: int = 4, num_prefix: int = 0) -> Targets:
    sampled = int(dense[-1].argmax())
    return targets_from_flat(
        flat_entries(dense[:-1], tokens[1:], k),
        flat_entries(dense[-1:], [sampled], k),
        tokens=tokens,
        num_prefix=num_prefix,
        k=k,
        vocab_size=dense.shape[1],
    )


def test_target_t_is_the_distribution_after_token_t() -> None:
    tokens = [3, 1, 4, 1, 5]
    dense = dense_logprobs(tokens)
    targets = capture(tokens, dense)
    top = np.argsort(-dense, axis=1, kind="stable")[:, :4]
    assert targets.ids.dtype == np.uint32
    np.testing.assert_array_equal(targets.ids, top)
    np.testing.assert_array_equal(targets.logprobs, np.take_along_axis(dense, top, axis=1))
    np.testing.assert_array_equal(targets.label_logprob[:-1], dense[np.arange(4), tokens[1:]])
    assert np.isnan(targets.label_logprob[-1])


def test_one_token_has_one_target_and_no_label() -> None:
    targets = capture([7], dense_logprobs([7]))
    assert targets.num_positions == 1
    assert np.isnan(targets.label_logprob).all()


@pytest.mark.parametrize("num_prefix", [1, 2, 4])
def test_targets_of_the_prefix_are_dropped(num_prefix: int) -> None:
    tokens = [3, 1, 4, 1, 5]
    dense = dense_logprobs(tokens)
    whole, kept = capture(tokens, dense), capture(tokens, dense, num_prefix=num_prefix)
    for name in ("ids", "logprobs", "log_tail", "label_logprob"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(whole, name)[num_prefix:])


def test_unsorted_entries_are_sorted_and_ties_keep_their_order() -> None:
    sampled = FlatEntries(ids=[9, 5, 2, 8, 1], logprobs=[-1.0, -3.0, -1.0, -2.0, -1.0])
    targets = targets_from_flat(
        FlatEntries(ids=[], logprobs=[]), sampled, tokens=[0], num_prefix=0, k=4, vocab_size=VOCAB
    )
    assert targets.ids.tolist() == [[2, 1, 8, 5]]
    assert targets.logprobs.tolist() == [[-1.0, -1.0, -2.0, -3.0]]


def test_masked_tokens_are_legal() -> None:
    tokens = [0, 1, 2]
    dense = dense_logprobs(tokens)
    dense[:, 3:] = -np.inf
    dense[0, 1] = -np.inf
    targets = capture(tokens, dense, k=6)
    assert np.isneginf(targets.logprobs[:, -1]).all()
    assert np.isneginf(targets.label_logprob[0])


@pytest.mark.parametrize("where", ["top", "label", "last"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_never_an_answer(where: str, value: float) -> None:
    prompt = FlatEntries(ids=[1, 5, 6], logprobs=[-2.0, -1.0, -2.0])
    sampled = FlatEntries(ids=[5, 5, 6], logprobs=[-1.0, -1.0, -2.0])
    broken = {"top": (prompt, 2), "label": (prompt, 0), "last": (sampled, 1)}[where]
    assert isinstance(broken[0].logprobs, list)
    broken[0].logprobs[broken[1]] = value
    with pytest.raises(TeacherFailed, match="not a number at position"):
        targets_from_flat(prompt, sampled, tokens=[0, 1], num_prefix=0, k=2, vocab_size=VOCAB)


def test_a_missing_position_is_an_error() -> None:
    tokens = [3, 1, 4]
    dense = dense_logprobs(tokens)
    with pytest.raises(TeacherFailed, match="where 2 positions of 5 were due"):
        targets_from_flat(
            flat_entries(dense[:1], [1], 4),
            flat_entries(dense[-1:], [0], 4),
            tokens=tokens,
            num_prefix=0,
            k=4,
            vocab_size=VOCAB,
        )


def test_logprobs_of_other_tokens_are_an_error() -> None:
    dense = dense_logprobs([3, 1, 4])
    with pytest.raises(TeacherFailed, match="not those of the tokens"):
        targets_from_flat(
            flat_entries(dense[:2], [1, 5], 4),
            flat_entries(dense[-1:], [0], 4),
            tokens=[3, 1, 4],
            num_prefix=0,
            k=4,
            vocab_size=VOCAB,
        )


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    tokens = [3, 1, 4]
    targets = capture(tokens, dense_logprobs(tokens), k=VOCAB)
    assert np.isneginf(targets.log_tail).all()


def test_a_sum_past_one_leaves_no_tail() -> None:
    logprobs = np.array([[np.log1p(-1e-8), np.log(2e-8)], [0.0, -20.0]], dtype=np.float32)
    assert np.isneginf(log_tail(logprobs)).all()


@given(st.integers(1, VOCAB - 1), st.integers(0, 1000), st.integers(1, 6))
def test_top_k_and_tail_hold_all_the_mass(k: int, seed: int, length: int) -> None:
    tokens = [t % VOCAB for t in range(length)]
    targets = capture(tokens, dense_logprobs(tokens, seed), k=k)
    total = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(targets.log_tail.astype(np.float64))
    np.testing.assert_allclose(total, 1.0, atol=2 * TAIL_FLOOR)
