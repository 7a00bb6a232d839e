"""Words as numbers, against words as strings."""

from __future__ import annotations

import random
import string
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from potstill.cache.text import words as module
from potstill.cache.text.words import ngram_hashes, normalised, word_hashes

WORDS = st.lists(st.text("abé中", min_size=1, max_size=4), max_size=40)


def lm_eval_words(text: str) -> list[str]:
    """Words as lm-eval's `janitor` makes them."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_normalised_as_lm_eval_does(text: str) -> None:
    kept = "".join(char for char in text if char.isprintable() or char.isspace())
    assert normalised(text).split() == lm_eval_words(kept)


def test_other_scripts() -> None:
    assert normalised("„Größe“ – ‘naïve’…  ÉTÉ\u2003ﬁn") == "größe naïve été fin"
    assert normalised("第13章：中文。") == "第 13 章 中 文"
    assert normalised("snake_case don't\tA-B") == "snakecase dont ab"
    assert normalised("e\u0301t\u0301e\u0301") == normalised("\u00e9t\u0301\u00e9")
    assert normalised(" \n!?") == ""


@given(WORDS, st.integers(1, 20))
def test_runs_are_equal_where_their_words_are(words: list[str], n: int) -> None:
    hashes = ngram_hashes(word_hashes(" ".join(words)), n)
    runs = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    assert len(hashes) == len(runs)
    assert len({*zip(hashes.tolist(), runs, strict=True)}) == len(set(runs)) == len(np.unique(hashes))


def test_hashes_are_the_same_on_every_machine() -> None:
    assert [f"{each:016x}" for each in word_hashes("one two one").tolist()] == KNOWN
    assert np.array_equal(word_hashes("one two")[1:], word_hashes("two one")[:1])


KNOWN = ["b79fd13100b87913", "04c422ab4139bfd3", "b79fd13100b87913"]


def test_a_long_text_is_hashed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    text = " ".join("".join(chance.choices("abcde", k=chance.randint(1, 9))) for _ in range(500))
    whole = word_hashes(text)
    monkeypatch.setattr(module, "_BLOCK", 64)
    assert np.array_equal(word_hashes(text), whole)
    assert len(word_hashes("x" * 1000)) == 1
    assert len(word_hashes("a " + "x" * 1000 + " b")) == 3
    assert len(word_hashes("a " * 31 + "b" * 2 + " c")) == 33


def test_random_words_do_not_collide() -> None:
    words = sorted({format(number * 7919, "x") for number in range(200_000)})
    hashes = word_hashes(" ".join(words))
    assert len(np.unique(hashes)) == len(words)
    assert not [low for low, high in pairwise(np.sort(hashes & np.uint64(0xFFFFFFFFFF)).tolist()) if low == high]
