"""What every implementation of a protocol must do. Subclass, give the fixture, and the tests run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cache import Fields
from cache.errors import LimitExceeded, PotstillError, UnsupportedField
from cache.types import Teacher, TeacherIdentity, Tokens


def rows(*lengths: int) -> list[Tokens]:
    """Rows of small, different token ids."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 40, length).astype(np.uint32) for length in lengths]


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

    async def test_what_it_cannot_give_is_refused(self, teacher: Teacher) -> None:
        limit = teacher.limits.max_top_k or teacher.identity.vocab_size
        with pytest.raises(LimitExceeded):
            await teacher.score(rows(3), Fields(k=limit + 1))
        with pytest.raises(UnsupportedField):
            await teacher.score(rows(3), Fields(k=4, entropy=True))

    async def test_an_id_over_the_vocabulary_is_refused(self, teacher: Teacher) -> None:
        row = np.array([1, teacher.identity.vocab_size], dtype=np.uint32)
        with pytest.raises(PotstillError, match=str(teacher.identity.vocab_size)):
            await teacher.score([row], Fields(k=4))

    async def test_it_says_who_it_is(self, teacher: Teacher) -> None:
        assert TeacherIdentity.from_json(teacher.identity.to_json()) == teacher.identity
        assert len(teacher.identity.tokenizer_sha256) == 64
        assert teacher.provenance.engine
