"""Journals of rows of a fake teacher, and what they have to answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from potstill.cache import Targets
from potstill.cache.corpus.keys import row_key
from potstill.cache.encoding.logprobs import RankTable, encoding_by_name
from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import JournalRow, journal_records
from potstill.cache.store.root import Root
from potstill.cache.types import Tokens
from tests.support.fakes import FakeTeacher
from tests.support.round_trips import round_trip

K = 8
POLICY = JournalPolicy()
TEACHER = FakeTeacher()
RANKS = RankTable.plain(TEACHER.identity.vocab_size)


def row(*ids: int) -> Tokens:
    return np.array(ids, dtype=np.uint32)


def numbered(number: int, length: int = 5) -> Tokens:
    """A row of its own for every number."""
    return np.array([((number >> (4 * place)) % 16 + place) % 64 for place in range(length)], dtype=np.uint32)


def key_of(tokens: Tokens) -> bytes:
    return row_key(TEACHER.identity.tokenizer_sha256, tokens)


def kept(tokens: Tokens, k: int = K, encoding: str = "u8", teacher: FakeTeacher = TEACHER) -> JournalRow:
    exact = teacher.distribution(tokens, k)
    return JournalRow.of(key_of(tokens), tokens, exact, encoding_by_name(encoding), RANKS)[0]


def expected(tokens: Tokens, k: int = K, encoding: str = "u8", teacher: FakeTeacher = TEACHER) -> Targets:
    return round_trip(teacher.distribution(tokens, k), encoding_by_name(encoding), RANKS)


def same(a: Targets | None, b: Targets) -> bool:
    names = ("ids", "logprobs", "log_tail", "label_logprob")
    return a is not None and all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n != "ids") for n in names)


def journal(root: Root, policy: JournalPolicy = POLICY) -> Journal:
    """Open the journal of a process of its own, as far as the store can see."""
    return Journal(root, "smol", TEACHER.identity, policy)


def store(to: Journal, rows: Sequence[Tokens], k: int = K, encoding: str = "u8") -> None:
    """As one segment."""
    to.add([kept(tokens, k, encoding) for tokens in rows])
    to.flush(TEACHER.provenance)


def segments(root: Root) -> int:
    return len(journal_records(root, "smol"))


def found(in_: Journal, rows: Sequence[Tokens], k: int = K) -> list[Targets | None]:
    return in_.find([key_of(tokens) for tokens in rows], k)
