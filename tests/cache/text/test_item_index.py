"""The search for items in texts, against a search by strings."""

from __future__ import annotations

import random

import pytest

from potstill.cache.text.benchmark_items import Item
from potstill.cache.text.item_index import LEAST_WORDS, MOST_SHARING, ItemIndex, Match
from potstill.cache.text.words import normalised, word_hashes


def found(index: ItemIndex, text: str) -> list[Match]:
    return list(index.find(word_hashes(normalised(text))))


def words(chance: random.Random, count: int) -> list[str]:
    return [f"w{chance.randrange(50)}" for _ in range(count)]


def test_every_run_of_n_words_is_found_and_no_other() -> None:
    n = 5
    chance = random.Random(0)
    items = [
        Item("b", number, " ".join(words(chance, 30)), (" ".join(words(chance, chance.randint(1, 12))),))
        for number in range(40)
    ]
    index = ItemIndex(items, n)
    text = words(chance, 2000)
    for item in items[:10]:
        start = chance.randrange(1900)
        text[start : start + 7] = item.question.split()[3:10]
    joined = [f"{item.question} {item.answers[0]}".split() for item in items]
    expected = {
        (number, start)
        for number, item_words in enumerate(joined)
        for at in range(len(item_words) - n + 1)
        for start in range(len(text) - n + 1)
        if text[start : start + n] == item_words[at : at + n]
    }
    assert {(match.item, match.start) for match in found(index, " ".join(text))} == expected
    assert len(expected) >= 30


def test_questions_of_few_words_are_found_as_a_whole_and_with_their_answer() -> None:
    short = Item("b", 0, "Which part comes over first in a run?", ("The heads",))  # 8 words
    shorter = Item("b", 1, "What comes over first of all?", ("The heads, as they boil first",))  # 6 and 6
    shortest = Item("b", 2, "Why?", ("Because",))
    index = ItemIndex([short, shorter, shortest])
    assert index.not_looked_for == [2]
    assert [match.with_answer for match in found(index, f"... {short.question} Nobody knows")] == [False]
    assert found(index, "which part comes over first in a pot") == []
    both = f"{shorter.question} {shorter.answers[0]}"
    assert len(normalised(both).split()) == 12
    assert [match.item for match in found(index, f"x {both} y")] == [1]
    assert found(index, shorter.question) == []
    assert LEAST_WORDS == 8


def test_an_answer_near_a_question_is_told() -> None:
    question = " ".join(f"q{n}" for n in range(20))
    index = ItemIndex([Item("b", 0, question, ("heads",))])
    for text, with_answer in [
        (question, False),
        (f"{question} {'x ' * 40} heads", True),
        (f"heads {'x ' * 40} {question}", True),
        (f"{question} {'x ' * 200} heads", False),
        (f"{question} {'x ' * 40} headshots", False),
    ]:
        matches = found(index, text)
        assert matches
        assert any(match.with_answer for match in matches) == with_answer, text


def test_case_punctuation_and_spaces_do_not_hide_an_item() -> None:
    question = "The heads, hearts and tails of a run are parted by the distiller, aren't they: why?"
    index = ItemIndex([Item("b", 0, question)])
    assert found(index, question.upper().replace(" ", "\n  ").replace(",", ""))
    chinese = Item("b", 1, "每次蒸馏时都要重新装满容器，最先流出的部分要单独存放。")
    assert found(ItemIndex([chinese]), "他说：" + chinese.question.replace("，", " "))


@pytest.mark.parametrize("n", [1, 8, 13, 20])
def test_items_that_share_runs_are_all_named(n: int) -> None:
    text = " ".join(f"w{n}" for n in range(25))
    index = ItemIndex([Item("b", 0, text), Item("c", 0, text)], n)
    assert {match.item for match in found(index, text)} == {0, 1}
    assert len(found(index, text)) == 2 * (26 - n)


def test_memory_grows_with_the_runs() -> None:
    chance = random.Random(0)
    for count in (10, 1000):
        index = ItemIndex([Item("b", n, " ".join(f"w{chance.random()}" for _ in range(60))) for n in range(count)])
        assert index.num_runs == 48 * count
        assert 20 * index.num_runs <= index.num_bytes <= 28 * index.num_runs


def test_runs_that_many_items_have_are_no_sign_of_any() -> None:
    template = " ".join(f"w{n}" for n in range(15))
    items = [Item("b", n, f"{template} {' '.join(f'own{n}x{m}' for m in range(15))}") for n in range(MOST_SHARING + 1)]
    items.append(Item("b", len(items), template))
    index = ItemIndex(items)
    assert found(index, template) == []
    assert index.not_looked_for == [len(items) - 1]
    assert {match.item for match in found(index, items[3].question)} == {3}
    assert {match.item for match in found(ItemIndex(items[:MOST_SHARING]), template)} == set(range(MOST_SHARING))
