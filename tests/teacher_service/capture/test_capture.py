from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from potstill.cache.encoding.draws import draw_rows
from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Draws, Fields, Targets
from potstill.teacher_service.capture.layout import Asked, Captured, float_sections, split
from potstill.teacher_service.capture.targets import (
    TAIL_FLOOR,
    FlatEntries,
    log_tail,
    targets_from_captured,
    targets_from_flat,
)
from tests.support.contracts import FIELDS, assert_exactly

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
        Asked(tokens=tokens, num_prefix=num_prefix, want=Fields(k=k)),
        dense.shape[1],
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
    asked = Asked(tokens=[0], num_prefix=0, want=Fields(k=4))
    targets = targets_from_flat(FlatEntries(ids=[], logprobs=[]), sampled, asked, VOCAB)
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
        targets_from_flat(prompt, sampled, Asked(tokens=[0, 1], num_prefix=0, want=Fields(k=2)), VOCAB)


def test_a_missing_position_is_an_error() -> None:
    tokens = [3, 1, 4]
    dense = dense_logprobs(tokens)
    with pytest.raises(TeacherFailed, match="where 2 positions of 5 were due"):
        targets_from_flat(
            flat_entries(dense[:1], [1], 4),
            flat_entries(dense[-1:], [0], 4),
            Asked(tokens=tokens, num_prefix=0, want=Fields(k=4)),
            VOCAB,
        )


def test_logprobs_of_other_tokens_are_an_error() -> None:
    dense = dense_logprobs([3, 1, 4])
    with pytest.raises(TeacherFailed, match="not those of the tokens"):
        targets_from_flat(
            flat_entries(dense[:2], [1, 5], 4),
            flat_entries(dense[-1:], [0], 4),
            Asked(tokens=[3, 1, 4], num_prefix=0, want=Fields(k=4)),
            VOCAB,
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


TOKENS = [3, 1, 4, 1, 5]
EVERYTHING = Fields(k=4, draws=6, seed=1, entropy=True, temperatures=(0.5, 2.0), dense=True)


def worker_answer(want: Fields, *, num_prefix: int = 0) -> Captured:
    """What a worker sends for `TOKENS`, whose distributions are `dense_logprobs`."""
    dense, row = dense_logprobs(TOKENS)[num_prefix:], TOKENS[num_prefix:]
    top = np.argsort(-dense, axis=1, kind="stable")[:, : want.k]
    sections = {
        "top": dense.max(axis=1),
        "logprobs": np.take_along_axis(dense, top, axis=1),
        "label_logprob": dense[np.arange(len(row)), [*row[1:], 0]],
        "entropy": -(np.exp(dense) * dense).sum(axis=1),
        "log_z": np.stack([np.logaddexp.reduce(dense / t, axis=1) for t in want.temperatures or (1.0,)], axis=1),
        "dense": dense,
    }
    due = float_sections(want, len(row), VOCAB)
    floats = np.concatenate([sections[name].ravel() for name in due]).astype(np.float32)
    ints = [np.asarray(row)]
    if want.draws:
        draws = draw_rows(dense, want.draws, want.seed, b"row")
        ints += [np.diff(draws.offsets), draws.ids, draws.counts]
    return Captured(top.astype(np.int32), floats, np.concatenate(ints).astype(np.int32))


def received(answer: Captured, want: Fields, *, num_prefix: int = 0) -> Targets:
    return targets_from_captured(answer, Asked(tokens=TOKENS, num_prefix=num_prefix, want=want), VOCAB)


@pytest.mark.parametrize("want", [*FIELDS.values(), EVERYTHING], ids=[*FIELDS, "everything"])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_what_the_worker_sends_becomes_what_was_asked_for(want: Fields, num_prefix: int) -> None:
    targets = received(worker_answer(want, num_prefix=num_prefix), want, num_prefix=num_prefix)
    assert targets.num_positions == len(TOKENS) - num_prefix
    assert_exactly(targets, want, VOCAB)
    if want.k:
        flat = capture(TOKENS, dense_logprobs(TOKENS), k=want.k, num_prefix=num_prefix)
        for name in ("ids", "logprobs", "log_tail", "label_logprob"):
            np.testing.assert_array_equal(getattr(targets, name), getattr(flat, name))
    if want.draws:
        assert isinstance(targets.draws, Draws)
        assert np.add.reduceat(targets.draws.counts, targets.draws.offsets[:-1]).tolist() == [want.draws] * len(
            targets.ids
        )


@pytest.mark.parametrize("want", [Fields(k=4), Fields(k=0, draws=6), EVERYTHING], ids=["top-k", "draws", "everything"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_position_whose_top_is_no_number_is_refused(want: Fields, value: float) -> None:
    answer = worker_answer(want)
    split(answer.floats, float_sections(want, len(TOKENS), VOCAB))["top"][3] = value
    with pytest.raises(TeacherFailed, match="not a number at position 3"):
        received(answer, want)


@pytest.mark.parametrize("name", ["entropy", "log_z"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_entropy_or_log_z_that_is_not_finite_is_refused(name: str, value: float) -> None:
    answer = worker_answer(EVERYTHING)
    split(answer.floats, float_sections(EVERYTHING, len(TOKENS), VOCAB))[name][3:4] = value
    with pytest.raises(TeacherFailed, match=rf"{name} .*(nan|inf).* at position 3"):
        received(answer, EVERYTHING)


def test_an_answer_that_is_not_the_rows_is_refused() -> None:
    answer = worker_answer(EVERYTHING)
    with pytest.raises(TeacherFailed, match=r"100 numbers where \(5, 4\) and 30 were due"):
        received(answer, Fields(k=4))
    answer.ints[1] += 1
    with pytest.raises(TeacherFailed, match="not those of the tokens"):
        received(answer, EVERYTHING)


def test_a_wrong_number_of_draws_is_refused() -> None:
    answer = worker_answer(EVERYTHING)
    with pytest.raises(TeacherFailed, match="drawn ids"):
        received(Captured(answer.ids, answer.floats, answer.ints[:-1]), EVERYTHING)
    answer.ints[-1] += 1
    with pytest.raises(TeacherFailed, match="another number of draws than 6"):
        received(answer, EVERYTHING)


def test_a_failure_in_the_worker_is_told_in_one_line() -> None:
    message = np.frombuffer(b"RuntimeError: out of memory\nand a trace", np.uint8)
    answer = Captured(np.empty(0, np.int32), np.empty(0, np.float32), message)
    with pytest.raises(TeacherFailed, match="could not compute the targets of a row: RuntimeError: out of memory$"):
        received(answer, EVERYTHING)


def test_what_is_asked_survives_its_journey() -> None:
    asked = Asked(tokens=TOKENS, num_prefix=3, want=EVERYTHING)
    assert Asked.from_request(TOKENS, asked.to_extra_args()) == asked
    assert Asked.from_request(TOKENS, None) is None
    assert Asked.from_request(TOKENS, {"other": 1}) is None
    assert Asked.from_request(None, asked.to_extra_args()) is None
