"""What every implementation of a protocol must do. Subclass, give the fixture, and the tests run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from cache import Fields
from cache.errors import LimitExceeded, PotstillError, UnsupportedField
from cache.fields import check_fields
from cache.types import Targets, Teacher, TeacherIdentity, Tokens

FIELDS = {
    "draws": Fields(k=4, draws=20, seed=3),
    "entropy": Fields(k=4, entropy=True),
    "temperatures": Fields(k=4, temperatures=(0.5, 2.0)),
    "dense": Fields(k=4, dense=True),
    "draws without a top-k": Fields(k=0, draws=20, seed=3),
}
"""Wishes for more than a top-k, by name."""


def rows(*lengths: int) -> list[Tokens]:
    """Rows of small, different token ids."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 40, length).astype(np.uint32) for length in lengths]


def drawn(targets: Targets) -> tuple[list[int], list[int]]:
    """Ids and counts of all positions."""
    assert targets.draws is not None
    return targets.draws.ids.tolist(), targets.draws.counts.tolist()


def assert_exactly(targets: Targets, want: Fields, vocab_size: int) -> None:
    """All that was asked for, possible, of the right types, and nothing else."""
    check_fields(targets, want, vocab_size)
    asked = {"entropy": want.entropy, "log_z": bool(want.temperatures), "dense": want.dense, "draws": bool(want.draws)}
    assert {name: getattr(targets, name) is not None for name in asked} == asked
    for name in ("entropy", "log_z", "dense"):
        assert not asked[name] or getattr(targets, name).dtype == np.float32
    if targets.draws is not None:
        arrays = targets.draws.offsets, targets.draws.ids, targets.draws.counts
        assert [str(array.dtype) for array in arrays] == ["int64", "uint32", "uint16"]
    if not want.k:
        assert (targets.log_tail == 0).all()
        assert np.isnan(targets.label_logprob).all()


class TeacherContract:
    """Any `Teacher` over a vocabulary of at least 64.

    Bounds are loose enough for answers that went through an encoding.
    """

    async def test_it_answers_rows_in_order_with_one_target_a_token(self, teacher: Teacher) -> None:
        asked = rows(5, 1, 17)
        answers = await teacher.score(asked, Fields(k=8))
        assert [(a.num_positions, a.k) for a in answers] == [(5, 8), (1, 8), (17, 8)]
        for answer in answers:
            assert answer.ids.dtype == np.uint32
            assert answer.logprobs.dtype == answer.log_tail.dtype == answer.label_logprob.dtype == np.float32

    async def test_entries_fall_and_hold_all_mass_with_the_tail(self, teacher: Teacher) -> None:
        (answer,) = await teacher.score(rows(30), Fields(k=16))
        assert (np.diff(answer.logprobs, axis=1) <= 0).all()
        assert all(len(set(ids)) == 16 for ids in answer.ids.tolist())
        mass = np.exp(answer.logprobs.astype(np.float64)).sum(1) + np.exp(answer.log_tail.astype(np.float64))
        np.testing.assert_allclose(mass, 1.0, atol=2e-6)

    async def test_labels_are_the_rows_own_next_tokens_and_the_last_has_none(self, teacher: Teacher) -> None:
        (row,) = rows(30)
        (answer,) = await teacher.score([row], Fields(k=64))
        assert np.isnan(answer.label_logprob).tolist() == [False] * 29 + [True]
        for position in range(29):
            found = np.flatnonzero(answer.ids[position] == row[position + 1])
            if len(found):
                kept = answer.logprobs[position, found[0]]
                assert answer.label_logprob[position] == pytest.approx(kept, abs=0.07)

    async def test_a_longer_row_begins_with_the_targets_of_its_beginning(self, teacher: Teacher) -> None:
        (row,) = rows(20)
        short, whole = await teacher.score([row[:12], row], Fields(k=4))
        np.testing.assert_allclose(short.logprobs, whole.logprobs[:12], atol=0.07)

    async def test_many_callers_at_once_get_their_own_answers(self, teacher: Teacher) -> None:
        asked = rows(3, 9, 4, 21, 2, 2)
        alone = [(await teacher.score([row], Fields(k=4)))[0] for row in asked]
        together = await asyncio.gather(*(teacher.score([row], Fields(k=4)) for row in asked))
        for one, (other,) in zip(alone, together, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)

    async def test_no_rows_is_no_answer(self, teacher: Teacher) -> None:
        assert await teacher.score([], Fields(k=4)) == []

    async def test_more_entries_than_it_can_give_are_refused(self, teacher: Teacher) -> None:
        limit = teacher.limits.max_top_k or teacher.identity.vocab_size
        with pytest.raises(LimitExceeded):
            await teacher.score(rows(3), Fields(k=limit + 1))

    async def test_an_id_over_the_vocabulary_is_refused(self, teacher: Teacher) -> None:
        row = np.array([1, teacher.identity.vocab_size], dtype=np.uint32)
        with pytest.raises(PotstillError, match=str(teacher.identity.vocab_size)):
            await teacher.score([row], Fields(k=4))

    async def test_it_says_who_it_is(self, teacher: Teacher) -> None:
        assert TeacherIdentity.from_json(teacher.identity.to_json()) == teacher.identity
        assert len(teacher.identity.tokenizer_sha256) == 64
        assert teacher.provenance.engine


class TopKTeacherContract(TeacherContract):
    """A `Teacher` that gives the top-k and nothing else."""

    @pytest.mark.parametrize("name", FIELDS)
    async def test_a_field_that_it_cannot_give_is_refused_in_one_line(self, teacher: Teacher, name: str) -> None:
        with pytest.raises(UnsupportedField, match=name.split(maxsplit=1)[0]) as refused:
            await teacher.score(rows(5, 9), FIELDS[name])
        assert "\n" not in str(refused.value)


class FieldsTeacherContract(TeacherContract):
    """A `Teacher` that gives every field."""

    @pytest.mark.parametrize("name", FIELDS)
    async def test_a_field_is_given_as_it_was_asked_for(self, teacher: Teacher, name: str) -> None:
        want = FIELDS[name]
        answers = await teacher.score(rows(5, 1, 9), want)
        assert [(a.num_positions, a.k) for a in answers] == [(5, want.k), (1, want.k), (9, want.k)]
        for answer in answers:
            assert_exactly(answer, want, teacher.identity.vocab_size)

    async def test_fields_agree_with_the_full_distribution(self, teacher: Teacher) -> None:
        want = Fields(k=8, draws=20, seed=3, entropy=True, temperatures=(0.5, 2.0), dense=True)
        (answer,) = await teacher.score(rows(12), want)
        assert_exactly(answer, want, teacher.identity.vocab_size)
        assert answer.dense is not None
        assert answer.entropy is not None
        assert answer.log_z is not None
        dense = answer.dense.astype(np.float64)
        np.testing.assert_allclose(answer.entropy, -(np.exp(dense) * dense).sum(1), atol=0.02)
        tempered = np.stack([np.logaddexp.reduce(dense / t, axis=1) for t in want.temperatures], axis=1)
        np.testing.assert_allclose(answer.log_z, tempered, atol=0.05)
        np.testing.assert_allclose(
            np.take_along_axis(dense, answer.ids.astype(int), axis=1), answer.logprobs, atol=0.07
        )

    async def test_a_row_scored_twice_gives_the_same_draws_and_another_seed_others(self, teacher: Teacher) -> None:
        asked, want = rows(12, 7), FIELDS["draws"]
        together = await teacher.score(asked, want)
        (alone,) = await teacher.score(asked[1:], want)
        (reseeded,) = await teacher.score(asked[1:], replace(want, seed=4))
        assert drawn(alone) == drawn(together[1])
        assert drawn(alone) != drawn(reseeded)

    async def test_draws_follow_the_distribution(self, teacher: Teacher) -> None:
        (answer,) = await teacher.score(rows(3), Fields(k=0, draws=20_000, seed=1, dense=True))
        assert answer.draws is not None
        assert answer.dense is not None
        for position, dense in enumerate(answer.dense):
            there = answer.draws[position : position + 1]
            share = np.zeros(len(dense))
            share[there.ids] = there.counts / 20_000
            # Five standard deviations of a binomial share, which is at most 0.0036.
            np.testing.assert_allclose(share, np.exp(dense), atol=0.018)

    async def test_as_many_draws_as_can_be_kept_are_given(self, teacher: Teacher) -> None:
        (answer,) = await teacher.score(rows(3), Fields(k=0, draws=65_535))
        assert answer.draws is not None
        assert (np.add.reduceat(answer.draws.counts.astype(np.int64), answer.draws.offsets[:-1]) == 65_535).all()
