"""Contracts that every implementation of a protocol must keep. Subclass, give the fixture, and the tests run."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.cache import Fields
from potstill.cache.encoding.fields import check_fields
from potstill.cache.errors import InvalidInput, LimitExceeded, NotCommitted, PotstillError, UnsupportedField
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Targets, Teacher, TeacherIdentity, Tokens

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


class TargetSetContract:
    """Any target set of a corpus of at least four shards, all but the last committed with all of `FULL`.

    Give the fixtures `targets`, and `local`, the same target set opened from its files.
    """

    FULL = Fields(k=8, draws=20, seed=3, entropy=True, temperatures=(0.5, 2.0))
    COLUMNS = ("ids", "logprobs", "log_tail", "label_logprob", "entropy", "log_z")

    def assert_same(self, one: Targets, other: Targets) -> None:
        """Every bit of every field."""
        for name in self.COLUMNS:
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                assert mine.dtype == theirs.dtype
                assert mine.tobytes() == theirs.tobytes(), name
        assert (one.draws is None) == (other.draws is None)
        if one.draws is not None and other.draws is not None:
            for name in ("offsets", "ids", "counts"):
                np.testing.assert_array_equal(getattr(one.draws, name), getattr(other.draws, name))

    def test_it_says_what_it_holds(self, targets: Any, local: TargetSet) -> None:
        assert targets.teacher == local.teacher
        assert targets.identity == local.identity
        assert targets.fields == local.fields == self.FULL
        assert targets.encoding == local.encoding
        assert targets.committed.tolist() == local.committed.tolist()
        assert targets.is_committed(0)
        assert not targets.is_committed(local.corpus.num_shards - 1)

    def test_ranges_within_and_across_shards_are_read(self, targets: Any, local: TargetSet) -> None:
        starts = local.corpus.shard_starts.tolist()
        for start, stop in ((0, 1), (starts[1] - 1, starts[1]), (starts[1] - 3, starts[2] + 3), (0, starts[-2])):
            self.assert_same(targets.read(start, stop), local.read(start, stop))

    @pytest.mark.parametrize(
        "fields",
        [
            Fields(k=8),
            Fields(k=3),
            Fields(k=0, entropy=True),
            Fields(k=0, draws=20, seed=3),
            Fields(k=2, draws=20, seed=3, temperatures=(0.5, 2.0)),
            FULL,
        ],
    )
    def test_chosen_fields_alone_are_read(self, targets: Any, local: TargetSet, fields: Fields) -> None:
        read = targets.read(5, 40, fields=fields)
        assert_exactly(read, fields, local.identity.vocab_size)
        self.assert_same(read, local.read(5, 40, fields=fields))

    def test_a_prefix_of_the_kept_entries_is_read(self, targets: Any, local: TargetSet) -> None:
        for k in (0, 1, 5, 8):
            self.assert_same(targets.read(0, 30, k=k), local.read(0, 30, k=k))
            top_k = Fields(k=8)
            if k:
                self.assert_same(targets.read(0, 30, k=k, fields=top_k), local.read(0, 30, fields=top_k).prefix(k))

    def test_rows_come_in_the_order_they_are_asked_for(self, targets: Any, local: TargetSet) -> None:
        last = int(local.corpus.shard_rows[-2]) - 1
        rows = [last, 0, 7, 7, 3]
        for one, other in zip(targets.read_rows(rows), local.read_rows(rows), strict=True):
            self.assert_same(one, other)
        for one, other in zip(targets.read_rows(rows, k=2), local.read_rows(rows, k=2), strict=True):
            self.assert_same(one, other)
        assert targets.read_rows([]) == []

    @pytest.mark.parametrize("name", ["log_tail", "label_logprob", "entropy"])
    def test_one_column_is_read_alone(self, targets: Any, local: TargetSet, name: str) -> None:
        read = targets.read_column(name, 3, 1000)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, local.read_column(name, 3, 1000))

    def test_the_top_k_alone_is_a_target_set(self, targets: Any, local: TargetSet) -> None:
        alone = targets.top_k_only()
        assert alone.fields == local.top_k_only().fields
        self.assert_same(alone.read(0, 20), local.top_k_only().read(0, 20))

    def test_what_is_not_kept_is_refused_in_one_line(self, targets: Any) -> None:
        for fields in (
            Fields(k=9),
            Fields(dense=True, k=0),
            Fields(k=0, draws=19, seed=3),
            Fields(temperatures=(3.0,)),
        ):
            with pytest.raises(UnsupportedField) as refused:
                targets.read(0, 10, fields=fields)
            assert "\n" not in str(refused.value)
        with pytest.raises(UnsupportedField):
            targets.read_rows([0], k=9)
        with pytest.raises(UnsupportedField):
            targets.read_column("dense", 0, 10)

    def test_what_is_not_committed_is_refused(self, targets: Any, local: TargetSet) -> None:
        corpus = local.corpus
        missing = int(corpus.shard_starts[-2])
        with pytest.raises(NotCommitted, match=f"shard {corpus.num_shards - 1}"):
            targets.read(missing - 5, missing + 5)
        with pytest.raises(NotCommitted):
            targets.read_rows([0, len(corpus) - 1])

    def test_a_range_outside_the_corpus_is_refused(self, targets: Any, local: TargetSet) -> None:
        end = local.corpus.num_positions
        for start, stop in ((0, 0), (5, 4), (-1, 4), (end - 1, end + 1), (end, end + 1)):
            with pytest.raises(InvalidInput):
                targets.read(start, stop)
        for row in (-1, len(local.corpus)):
            with pytest.raises(InvalidInput, match=str(row)):
                targets.read_rows([0, row])
        with pytest.raises(InvalidInput):
            targets.read(0, 5, k=-1)

    def test_a_mask_or_fractions_are_no_row_numbers(self, targets: Any) -> None:
        mask = np.zeros(len(targets.corpus), dtype=bool)
        for rows in (mask, mask.tolist(), [1, True]):
            with pytest.raises(InvalidInput, match=r"take np.flatnonzero\(mask\) of a mask"):
                targets.read_rows(rows)
        for rows in ([0, 1.9], np.array([0, 1.9])):
            with pytest.raises(InvalidInput, match=r"rows are float64, like \[0.0, 1.9\]; give whole numbers"):
                targets.read_rows(rows)

    def test_many_threads_read_at_once(self, targets: Any, local: TargetSet) -> None:
        def read(start: int) -> Targets:
            found: Targets = targets.read(start, start + 200)
            return found

        with ThreadPoolExecutor(8) as pool:
            for start, found in zip(range(0, 1200, 100), pool.map(read, range(0, 1200, 100)), strict=True):
                self.assert_same(found, local.read(start, start + 200))


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
