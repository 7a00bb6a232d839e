"""Measures of texts, against plain counting."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from potstill.cache.text.language import LANGUAGES_WITH_STOP_WORDS, UNKNOWN, language_of, stop_words
from potstill.cache.text.measures import MEASURES, measures
from potstill.cache.text.words import normalised, word_hashes
from tests.support.corpora import topics


def measured(text: str, language: str = "en") -> dict[str, float]:
    words = normalised(text)
    lengths = np.array([len(word) for word in words.split()], np.int64)
    return measures(text, word_hashes(words), lengths, stop_words(language), MEASURES)


def plain_top(words: list[str], n: int) -> float:
    runs = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    run, count = max(runs.items(), key=lambda item: item[1], default=((), 0))
    return min(1.0, count * len("".join(run)) / len("".join(words))) if count > 1 else 0.0


def plain_duplicate(words: list[str], n: int) -> float:
    seen, covered = set(), set[int]()
    for at in range(len(words) - n + 1):
        run = tuple(words[at : at + n])
        covered |= set(range(at, at + n)) if run in seen else set()
        seen.add(run)
    return sum(len(words[at]) for at in covered) / len("".join(words))


def test_words_lines_and_symbols_of_a_text() -> None:
    text = "The #1 cat and the dog...\n- 12 be\n\n* have\nend.\n"
    found = measured(text)
    assert found["words"] == 12
    assert found["mean_word_length"] == pytest.approx(sum(map(len, text.split())) / 12)
    assert found["symbols"] == pytest.approx(2 / 12)
    assert found["alphabetic_words"] == pytest.approx(8 / 12)
    assert found["stop_words"] == 4
    assert found["bullet_lines"] == 0.5
    assert found["ellipsis_lines"] == 0.25
    assert found["punctuated_lines"] == 0.5
    assert found["short_lines"] == 1
    assert found["duplicate_lines"] == 0


def test_copies_of_lines_and_paragraphs() -> None:
    found = measured("one\ntwo\none\n\nlonger line\n\nlonger line\n\none")
    assert found["duplicate_lines"] == 0.5
    assert found["duplicate_line_characters"] == pytest.approx((3 + 3 + 11) / 34)
    assert found["duplicate_paragraphs"] == 0.25
    assert found["duplicate_paragraph_characters"] == pytest.approx(11 / (11 + 11 + 11 + 3))


def test_a_letter_of_a_script_without_spaces_is_a_word() -> None:
    found = measured("第13章 中文和 English 混合", "zh")
    assert found["words"] == 9
    assert "mean_word_length" not in found  # it would say nothing
    assert "stop_words" not in found
    assert found["alphabetic_words"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_those_that_plain_counting_finds(seed: int) -> None:
    chance = random.Random(seed)
    some = ["".join(chance.choices("abc", k=chance.randint(1, 5))) for _ in range(3 + seed)]
    words = chance.choices(some, k=120) + [f"w{n}" for n in range(60)]
    found = measured(" ".join(words))
    for n in (2, 3, 4):
        runs = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1)).most_common(2)
        if len(runs) > 1 and runs[0][1] > runs[1][1]:  # else any of several is the top
            assert found[f"top_{n}_gram"] == pytest.approx(plain_top(words, n))
    for n in range(5, 11):
        assert found[f"duplicate_{n}_grams"] == pytest.approx(plain_duplicate(words, n))


def test_texts_without_anything() -> None:
    assert measured("") == {"words": 0.0, "stop_words": 0.0}
    assert measured("?")["words"] == 1
    assert "top_2_gram" not in measured("?!")
    assert set(measured("a word")) == set(MEASURES)


def test_only_what_is_wanted_is_measured() -> None:
    words = normalised(topics(1)[0])
    lengths = np.array([len(word) for word in words.split()], np.int64)
    assert set(measures(topics(1)[0], word_hashes(words), lengths, (), {"words", "top_2_gram"})) == {
        "words",
        "top_2_gram",
    }


SENTENCES = {
    "en": "The vessel is filled anew for each distillation, and what comes over first is kept apart.",
    "de": "Das Gefäß wird für jeden Brand neu gefüllt, und was zuerst kommt, wird getrennt aufbewahrt.",
    "fr": "Le récipient est rempli à nouveau pour chaque distillation, et les têtes sont mises à part.",
    "es": "El recipiente se llena de nuevo para cada destilación, y lo primero que sale se guarda aparte.",
    "ru": "Сосуд заполняют заново для каждой перегонки, а то, что выходит первым, отделяют.",
    "zh": "每次蒸馏时都要重新装满容器，最先流出的部分要单独存放。",
    "un": "0x1f 0x2e 17 29 31 :: 88 99 ++ 12",
}


@pytest.mark.parametrize(("language", "text"), SENTENCES.items())
def test_languages_are_told(language: str, text: str) -> None:
    assert language_of(text) == language
    # Control characters, which the detector refuses, are passed over.
    assert language_of(text.replace(" ", " \x00\x1b ")) == language


def test_texts_of_no_language() -> None:
    assert language_of("") == language_of("\ufdd0\x00") == UNKNOWN
    assert all(len(stop_words(language)) > 6 for language in LANGUAGES_WITH_STOP_WORDS)
    assert not stop_words("xx")
