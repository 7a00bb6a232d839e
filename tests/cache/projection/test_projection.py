"""A teacher's targets become those of a corpus with another tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import SpecMismatch
from potstill.cache.projection.__main__ import main as compile_ahead
from potstill.cache.projection.kernels import path_logprobs, project_rows, sum_staying
from potstill.cache.types import PROJECTED_FROM
from tests.support.corpora import byte_tokenizer, topics
from tests.support.tokenizers import two_corpora
from tests.support.tokenizers.mistral import sentencepiece
from tests.support.tokenizers.small import piece, trained
from tests.support.tokenizers.two_corpora import mixed_texts, projected, taught, with_special, write

ingested = functools.partial(two_corpora.ingested, shard_positions=700)

TEXTS = [*topics(2, characters=400), *mixed_texts(1500, prose=300)]


@functools.cache
def saved_bpe(vocab_size: int, words: bool) -> str:
    return trained(topics(30), vocab_size, words=words).to_str()


def bpe(vocab_size: int, *, words: bool = True) -> Tokenizer:
    return Tokenizer.from_str(saved_bpe(vocab_size, words))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write(tmp_path / "text", TEXTS)
    return Cache.open(tmp_path / "cache", mode="r+")


@pytest.fixture
def text(tmp_path: Path, cache: Cache) -> Path:
    return tmp_path / "text"


def bits(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> list[int]:
    return values.view(np.uint32).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("framed", "row_tokens"),
    [("", 37), ("be", 50), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("e", 50), ("b", 37)))],
)
def test_an_equal_tokenizer_gives_the_same_bit_by_bit(cache: Cache, text: Path, framed: str, row_tokens: int) -> None:
    """However the rows are cut. A vocabulary that is larger than the tokenizer stays so."""
    tokenizer = with_special(bpe(400))
    teachers = ingested(cache, "teachers", text, tokenizer, framed=framed)
    students = ingested(cache, "students", text, tokenizer, framed=framed, row_tokens=row_tokens)
    theirs = taught(cache, teachers, vocab_size=teachers.vocab_size + 7).read(0, teachers.num_positions)
    targets, report = projected(cache)
    mine = targets.read(0, students.num_positions)
    assert np.array_equal(mine.ids, theirs.ids)
    assert bits(mine.logprobs) == bits(theirs.logprobs)
    assert bits(mine.log_tail) == bits(theirs.log_tail)
    both = ~np.isnan(mine.label_logprob) & ~np.isnan(theirs.label_logprob)
    assert bits(mine.label_logprob[both]) == bits(theirs.label_logprob[both])
    if row_tokens == 50:
        assert np.array_equal(np.isnan(mine.label_logprob), np.isnan(theirs.label_logprob))
    assert mine.alignment is not None
    assert not mine.alignment[:, 0].any()
    whole = report.tally.to_json()["all"]
    assert whole == {
        "positions": report.tally.num_positions,
        "aligned": 1,
        "one_to_one": 1,
        "agreeing": 1,
        "resolved": 1,
    }


def test_a_frame_on_one_side_only_moves_nothing(cache: Cache, text: Path) -> None:
    """The student's first token has no target of a teacher that sees nothing before it; all others are the same."""
    tokenizer = with_special(bpe(400))
    teachers = ingested(cache, "teachers", text, tokenizer)
    students = ingested(cache, "students", text, tokenizer, framed="be")
    theirs = taught(cache, teachers).read(0, teachers.num_positions)
    mine = projected(cache)[0].read(0, students.num_positions)
    tokens = students.tokens(0, students.num_positions)
    frame = np.isin(tokens, [token for token in map(tokenizer.token_to_id, ("<s>", "</s>")) if token is not None])
    assert frame.sum() == 2 * len(TEXTS)
    assert bits(mine.logprobs[~frame]) == bits(theirs.logprobs)
    assert np.array_equal(mine.ids[~frame], theirs.ids)
    assert mine.alignment is not None
    assert (mine.alignment[frame, 0] == 1).all()
    assert (mine.log_tail[frame] == 0).all()


@pytest.mark.parametrize("framed", ["", "be"])
def test_mass_is_conserved(cache: Cache, text: Path, framed: str) -> None:
    """Unresolved mass is in the tail; every row is a distribution over ids that the student has."""
    ingested(cache, "students", text, with_special(bpe(700)), framed=framed)
    teachers = ingested(cache, "teachers", text, with_special(bpe(330, words=False)), framed=framed)
    theirs = taught(cache, teachers)
    targets, report = projected(cache)
    mine = targets.read(0, targets.corpus.num_positions)
    assert mine.alignment is not None
    tail = np.exp(mine.log_tail.astype(np.float64))
    mass = np.exp(mine.logprobs.astype(np.float64)).sum(axis=1)
    assert np.abs(mass + tail - 1).max() < 1e-6
    assert (tail - mine.alignment[:, 0] > -1e-6).all()
    assert (np.diff(np.sort(mine.ids, axis=1)) > 0).all()
    assert 0.3 < report.tally.resolved < 1
    assert targets.identity.source == theirs.identity
    assert targets.identity.overrides[PROJECTED_FROM] == {
        "tokenizer_sha256": teachers.tokenizer_sha256,
        "vocab_size": teachers.vocab_size,
        "prefix_ids": [],
    }


def test_a_student_of_bytes_has_the_teachers_first_bytes(cache: Cache, text: Path) -> None:
    """At a boundary that both have, each byte's mass is that of the teacher's ids which begin with it."""
    tokenizer = bpe(400)
    students = ingested(cache, "students", text, byte_tokenizer())
    teachers = ingested(cache, "teachers", text, tokenizer)
    theirs = taught(cache, teachers, k=teachers.vocab_size).read(0, teachers.num_positions)
    mine = projected(cache)[0].read(0, students.num_positions)
    lengths = [len(piece(tokenizer, token)) for token in teachers.tokens(0, teachers.num_positions).tolist()]
    ends = np.cumsum(lengths) - 1
    assert mine.alignment is not None
    assert np.array_equal(np.flatnonzero(mine.alignment[:, 0] < 1), ends)
    vocab = students.tokenizer.get_vocab()
    for position, end in enumerate(ends[:200].tolist()):
        exact = np.zeros(256)
        alphabet = [piece(tokenizer, int(i))[0] for i in theirs.ids[position]]
        np.add.at(exact, [vocab[char] for char in alphabet], np.exp(theirs.logprobs[position]))
        found = np.zeros(256)
        found[mine.ids[end]] = np.exp(mine.logprobs[end])
        np.testing.assert_allclose(found, exact, atol=1e-6)


def test_chunks_have_the_teachers_likelihood_of_their_text(cache: Cache, text: Path) -> None:
    """Chunks lie in one row, begin and end where both tokenizers have a boundary, and none is within another."""
    students = ingested(cache, "students", text, bpe(700))
    teachers = ingested(cache, "teachers", text, bpe(330, words=False), row_tokens=10_000)
    theirs = taught(cache, teachers).read(0, teachers.num_positions)
    mine = projected(cache)[0].read(0, students.num_positions)
    assert mine.alignment is not None
    _, logprob, tokens = mine.alignment.T
    ends = np.flatnonzero(tokens)
    assert len(ends) > 100
    assert (tokens[ends] > 1).any()
    spelt = [piece(students.tokenizer, t) for t in students.tokens(0, students.num_positions).tolist()]
    their_spelt = [piece(teachers.tokenizer, t) for t in teachers.tokens(0, teachers.num_positions).tolist()]
    place = np.concatenate([[0], np.cumsum([len(each) for each in spelt])])
    their_place = np.concatenate([[0], np.cumsum([len(each) for each in their_spelt])]).tolist()
    rows = np.searchsorted(students.row_starts, np.arange(students.num_positions), side="right")
    for end in ends.tolist():
        begin = end + 1 - int(tokens[end])
        assert rows[begin] == rows[end + 1]
        low, high = their_place.index(place[begin + 1]), their_place.index(place[end + 2])
        np.testing.assert_allclose(logprob[end], theirs.label_logprob[low - 1 : high - 1].sum(), rtol=1e-5)


def test_a_shard_waits_for_the_teachers_targets(cache: Cache, text: Path) -> None:
    """A second call goes on when they are there, and a third has nothing to do."""
    ingested(cache, "students", text, bpe(700))
    teachers = ingested(cache, "teachers", text, bpe(330))
    taught(cache, teachers, missing=2)
    targets, report = projected(cache)
    assert report.shards_waiting
    assert report.shards_written == targets.committed.sum() > 0
    assert projected(cache)[1].tally.num_positions == 0, "while it waits nothing is made again to be told"
    taught(cache, teachers)
    targets, again = projected(cache)
    assert again.shards_before == report.shards_written
    assert targets.committed.all()
    assert projected(cache)[1].shards_written == 0


def test_sentencepiece_and_byte_level_tell_the_same_text(cache: Cache, text: Path) -> None:
    """One puts a space in front of documents and falls back to bytes; both ways round."""
    ingested(cache, "pieces", text, sentencepiece())
    teachers = ingested(cache, "bytes", text, bpe(330))
    taught(cache, teachers)
    targets, report = projected(cache, "pieces", "bytes")
    mine = targets.read(0, targets.corpus.num_positions)
    assert np.abs(np.exp(mine.logprobs).sum(axis=1) + np.exp(mine.log_tail) - 1).max() < 1e-5
    assert set(report.tally.to_json()) == {"all", "words", "digits", "spaces", "punctuation and code", "non-Latin"}
    assert report.tally.resolved > 0.2


def test_targets_go_where_others_do(cache: Cache, text: Path) -> None:
    """Coarser encodings keep them within their bounds, and say where they come from."""
    ingested(cache, "students", text, bpe(700))
    teachers = ingested(cache, "teachers", text, bpe(330))
    taught(cache, teachers, encoding="u8")
    targets, _ = projected(cache)
    assert targets.encoding.name == "u8"
    assert targets.fields == Fields(k=16, alignment=True)
    read: Targets = targets.read(0, targets.corpus.num_positions)
    assert read.alignment is not None
    assert read.alignment.shape == (targets.corpus.num_positions, 3)
    (commit,) = targets.commits_of([0], Fields(k=4))
    assert commit.provenance.whole_path == "fake, projected from corpus teachers, projection"
    with pytest.raises(SpecMismatch, match="tokenizer"):
        cache.fresh().plan_targets("fake", "students", targets.identity.source, fields=Fields(k=16))


def test_the_loops_that_are_compiled_ahead_are_those_of_a_projection(cache: Cache, text: Path) -> None:
    compile_ahead()
    ingested(cache, "students", text, bpe(300))
    taught(cache, ingested(cache, "teachers", text, bpe(330)))
    projected(cache)
    loops: tuple[Any, ...] = (path_logprobs, sum_staying, project_rows)
    assert [len(loop.signatures) for loop in loops] == [1, 1, 1]
