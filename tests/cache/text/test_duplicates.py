"""Copies, exact and near."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.duplicates import ExactCopies, NearCopies
from potstill.cache.text.known_hashes import NONE, KnownHashes
from potstill.cache.text.words import normalised, word_hashes
from tests.support.corpora import topics


def numbers(first: int, count: int) -> NDArray[np.uint32]:
    return np.arange(first, first + count, dtype=np.uint32)


def test_known_hashes_are_a_map() -> None:
    chance = np.random.default_rng(0)
    known, plain = KnownHashes(), dict[int, int]()
    for _ in range(200):
        some = np.unique(chance.integers(0, 5000, chance.integers(0, 60)).astype(np.uint64))
        found = known.numbers(some)
        assert found.tolist() == [plain.get(each, NONE) for each in some.tolist()]
        new = chance.permutation(some[found == NONE])
        known.add(new, numbers(len(plain), len(new)))
        plain |= {each: len(plain) + at for at, each in enumerate(new.tolist())}
    assert len(known) == len(plain)


def test_exact_copies_in_a_batch_and_across_batches() -> None:
    copies = ExactCopies()
    assert copies.seen(["a", "b", "a", " b\n"], numbers(10, 4)) == [NONE, NONE, 10, 11]
    assert copies.seen(["c", "b"], numbers(14, 2)) == [NONE, 11]
    assert copies.seen([], numbers(0, 0)) == []


def test_near_copies_are_found_and_other_texts_are_not() -> None:
    chance = random.Random(0)
    texts = [normalised(text).split() for text in topics(70, characters=4000)]
    texts = [words for words in texts if len(words) > 200]
    near = NearCopies()
    count = len(texts)
    assert set(near.seen([word_hashes(" ".join(words)) for words in texts], numbers(0, count))) == {NONE}
    edited = [[word if chance.random() >= 0.005 else "changed" for word in words] for words in texts]
    found = near.seen([word_hashes(" ".join(words)) for words in edited], numbers(count, count))
    assert sum(each == number for number, each in enumerate(found)) >= 0.97 * count
    short = [word_hashes(text) for text in ("two words", "two words", "others")]
    assert near.seen(short, numbers(900, 3)) == [NONE, 900, NONE]


def test_a_copy_of_a_copy_in_one_batch_is_like_the_first() -> None:
    words = word_hashes(" ".join(f"word{n}" for n in range(300)))
    assert NearCopies().seen([words, words, words], numbers(5, 3)) == [NONE, 5, 5]
    assert NearCopies().seen([], numbers(0, 0)) == []
