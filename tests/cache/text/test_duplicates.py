"""Copies, exact and near."""

from __future__ import annotations

import random

import numpy as np

from potstill.cache.text.duplicates import ExactCopies, NearCopies
from potstill.cache.text.known_hashes import KnownHashes
from potstill.cache.text.words import normalised, word_hashes
from tests.support.corpora import topics


def test_known_hashes_are_a_set() -> None:
    chance = np.random.default_rng(0)
    known, plain = KnownHashes(), set[int]()
    for _ in range(200):
        some = chance.integers(0, 5000, chance.integers(0, 60)).astype(np.uint64)
        assert known.has(some).tolist() == [each in plain for each in some.tolist()]
        new = some[~known.has(some)]
        known.add(new)
        plain |= set(new.tolist())
    assert len(known) == len(plain)


def test_exact_copies_in_a_batch_and_across_batches() -> None:
    copies = ExactCopies()
    assert copies.seen(["a", "b", "a", " b\n"]) == [False, False, True, True]
    assert copies.seen(["c", "b"]) == [False, True]
    assert copies.seen([]) == []


def test_near_copies_are_found_and_other_texts_are_not() -> None:
    chance = random.Random(0)
    texts = [normalised(text).split() for text in topics(70, characters=4000)]
    texts = [words for words in texts if len(words) > 200]
    near = NearCopies()
    assert not any(near.seen([word_hashes(" ".join(words)) for words in texts]))
    edited = [[word if chance.random() >= 0.005 else "changed" for word in words] for words in texts]
    found = near.seen([word_hashes(" ".join(words)) for words in edited])
    assert sum(found) >= 0.97 * len(texts)
    assert near.seen([word_hashes("two words"), word_hashes("two words"), word_hashes("others")]) == [
        False,
        True,
        False,
    ]


def test_a_copy_of_a_copy_in_one_batch_is_like_the_first() -> None:
    words = word_hashes(" ".join(f"word{n}" for n in range(300)))
    assert NearCopies().seen([words, words, words]) == [False, True, True]
    assert NearCopies().seen([]) == []
