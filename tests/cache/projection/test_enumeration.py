"""Projected targets against the exact distribution of the student's next token, by going through what may follow."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache import Cache, Fields, Provenance, Targets
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest_rows
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.targets.target_set import TargetSet
from tests.support.fakes import fake_identity
from tests.support.tokenizers.small import PairTeacher, of_letters, piece
from tests.support.tokenizers.two_corpora import projected

PAIRS = {
    "equal": ([("a", "b"), (" ", "c")], [("a", "b"), (" ", "c")]),
    "bytes": ([("a", "b"), ("ab", "c"), (" ", "a")], []),
    "longer": ([], [("a", "b"), (" ", "c")]),
    "other": ([("a", "b"), (" ", "a")], [("b", "c"), ("a", " ")]),
    "both": ([("a", "b"), ("c", " ")], [("a", "b"), (" ", "c")]),
}
"""Merges of the teacher and of the student."""
_NUM_TOKENS, _LAST = 100, 3
_NOBODY = Provenance(engine="", engine_version="", device="", capture_path="")
Compared = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Projected [P, W], exact [P, W] and unresolved [P], at the places that both tokenizers have."""


def _corpus(cache: Cache, name: str, tokenizer: Tokenizer, tokens: list[int]) -> Corpus:
    rows = [SourceRow(np.array(tokens, np.uint32), ends_document=True)]
    return ingest_rows(cache.root, name, rows, tokenizer, IngestPlan(row_tokens=len(tokens)))


def _kept(teacher: PairTeacher, tokens: list[int]) -> Targets:
    dense = np.stack([teacher.logprobs(token) for token in tokens])
    order = np.argsort(-dense, axis=1, kind="stable")
    return Targets(
        ids=order.astype(np.uint32),
        logprobs=np.take_along_axis(dense, order, axis=1).astype(np.float32),
        log_tail=np.full(len(tokens), -np.inf, np.float32),
        label_logprob=np.append(dense[np.arange(len(tokens) - 1), tokens[1:]], np.nan).astype(np.float32),
    )


def _exact(teacher: PairTeacher, student: Tokenizer, last: int) -> NDArray[np.float64]:
    """[W] of the student's first token after a token of the teacher's, whatever the text before."""
    longest = max(len(text) for text in student.get_vocab())
    found = np.zeros(student.get_vocab_size())
    texts = teacher.continuations(last, 2 * longest + 2)
    for mass, encoded in zip(texts.values(), student.encode_batch(list(texts)), strict=True):
        found[encoded.ids[0]] += mass
    return found


@pytest.fixture(params=PAIRS, scope="module")
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Project a teacher, and compute the exact distributions."""
    theirs, mine = (of_letters(merges) for merges in PAIRS[request.param])
    teacher = PairTeacher(theirs, seed=1)
    tokens = teacher.write(_NUM_TOKENS, seed=2)
    text = "".join(teacher.texts[token] for token in tokens)
    assert theirs.encode(text).ids == tokens
    # Of an id that the text lacks it is not known how much of it stays apart.
    assert set(tokens) == {each for token in tokens for each in teacher.nexts[token]} | {tokens[0]}
    cache = Cache.open(tmp_path_factory.mktemp("cache"), mode="r+")
    teachers = _corpus(cache, "teachers", theirs, tokens)
    students = _corpus(cache, "students", mine, mine.encode(text).ids)
    identity = fake_identity(vocab_size=teacher.vocab_size, tokenizer_sha256=teachers.tokenizer_sha256)
    fields = Fields(k=teacher.vocab_size)
    planned = cache.plan_targets("fake", "teachers", identity, fields=fields, encoding="f32")
    assert planned.write_shard(
        0, _kept(teacher, tokens), Provenance(engine="", engine_version="", device="", capture_path="")
    )
    return _at_common_places(teacher, tokens, projected(cache)[0], students)


def _at_common_places(teacher: PairTeacher, tokens: list[int], targets: TargetSet, students: Corpus) -> Compared:
    read = targets.read(0, students.num_positions)
    spelt = [len(piece(students.tokenizer, token)) for token in students.row(0).tolist()]
    ends = np.cumsum([len(teacher.texts[token]) for token in tokens]).tolist()
    exact_after = {last: _exact(teacher, students.tokenizer, last) for last in set(tokens)}
    found, exact, unresolved = [], [], []
    assert read.alignment is not None
    # The teacher's texts do not end, so that the last tokens of this one are others than it knows of.
    for position, end in enumerate(np.cumsum(spelt).tolist()[:-_LAST]):
        if end in ends:
            row = np.zeros(students.vocab_size)
            row[read.ids[position]] = np.exp(read.logprobs[position].astype(np.float64))
            found.append(row)
            exact.append(exact_after[tokens[ends.index(end)]])
            unresolved.append(read.alignment[position, 0])
        else:
            assert read.alignment[position, 0] == 1
    assert len(found) > 20
    return np.array(found), np.array(exact), np.array(unresolved, dtype=np.float64)


def test_no_id_has_more_than_its_exact_mass(compared: Compared) -> None:
    """Mass that an id misses is unresolved, all of it; without any, the distribution is the exact one.

    After this teacher's tokens what follows depends on the last alone, so that what stays apart is known exactly.
    """
    found, exact, unresolved = compared
    assert (found - exact).max() < 1e-6
    np.testing.assert_allclose((exact - found).sum(axis=1), unresolved, atol=1e-6)


def test_shorter_tokens_are_resolved_wholly(compared: Compared, request: pytest.FixtureRequest) -> None:
    """The student's tokens being those of the teacher or parts of them, there is nothing that is not known."""
    found, exact, unresolved = compared
    if request.node.callspec.params["compared"] in ("equal", "bytes"):
        assert not unresolved.any()
        np.testing.assert_allclose(found, exact, atol=1e-6)
    else:
        assert unresolved.any()
        # Much is known even where the student's tokens go on behind the teacher's.
        assert found.sum() / exact.sum() > 0.4
