"""Items of benchmarks in the rows of real corpora."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from potstill.cache.cache import Cache
from potstill.cache.commands.text import contamination as command
from potstill.cache.corpus.annotations import open_annotation
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.text import row_texts
from potstill.cache.text.contamination import look_for, open_index
from potstill.cache.text.row_texts import Window, rows_of_words, windows, words_of
from potstill.cache.text.words import normalised
from tests.support.command_line import refusal, run_command
from tests.support.corpora import byte_tokenizer, make_corpus, topics

_CHANCE = random.Random(5)
_WORDS = [
    "the",
    "a",
    "of",
    "still",
    "head",
    "heart",
    "tail",
    "run",
    "cask",
    "oak",
    "copper",
    "malt",
    "grain",
    "yeast",
    "water",
    "steam",
    "spirit",
    "cut",
    "year",
]
QUESTIONS = [f"How many {' '.join(_CHANCE.choices(_WORDS, k=28))}?" for _ in range(12)]


def write_items(path: Path, questions: list[str]) -> Path:
    records = [{"question": question, "answer": f"{n} litres and no more"} for n, question in enumerate(questions)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def planted(texts: list[str], questions: list[str], seed: int = 0) -> list[str]:
    """Each question in the middle of another text."""
    chance = random.Random(seed)
    texts = list(texts)
    for number, question in enumerate(questions):
        at = chance.randrange(len(texts[number]))
        texts[number] = f"{texts[number][:at]} {question} {texts[number][at:]}"
    return texts


def row_text(corpus: Corpus, row: int) -> str:
    return corpus.tokenizer.decode(corpus.row(row).tolist())


@pytest.mark.parametrize("row_tokens", [23, 50, 4000])
def test_each_planted_item_is_found_in_exactly_the_rows_that_it_lies_in(tmp_path: Path, row_tokens: int) -> None:
    texts = planted(topics(20, characters=2000), QUESTIONS)
    _, corpus = make_corpus(tmp_path / "c", texts=texts, row_tokens=row_tokens)
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    result = look_for(corpus, [file], open_index([file]))
    assert result.benchmarks[0].found == len(QUESTIONS)
    expected = set()
    for number, question in enumerate(QUESTIONS):
        first = corpus.document_rows[number]
        start = len(texts[number][: texts[number].index(question)].encode())
        stop = start + len(question.encode()) - 1  # the mark at the end is no part of a word
        expected |= {(first + row, number) for row in range(start // row_tokens, (stop - 1) // row_tokens + 1)}
    assert {(each.row, each.item) for each in result.found} == expected
    assert all(each.matched and each.matched in normalised(QUESTIONS[each.item]) for each in result.found)
    assert np.flatnonzero(result.rows).tolist() == sorted({row for row, _ in expected})


def test_clean_text_is_left_alone(tmp_path: Path) -> None:
    _, corpus = make_corpus(tmp_path / "c", texts=topics(20, characters=2000))
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    result = look_for(corpus, [file], open_index([file]))
    assert not result.rows.any()
    assert result.benchmarks[0].found == 0


def test_a_long_document_is_searched_across_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_texts, "_WINDOW_TOKENS", 1500)
    monkeypatch.setattr(row_texts, "_OVERLAP_TOKENS", 400)
    monkeypatch.setattr(row_texts, "_READ_ROWS", 7)
    text = " ".join(planted(topics(30, characters=900), QUESTIONS))
    _, corpus = make_corpus(tmp_path / "c", texts=[text, "short"], row_tokens=40)
    cut = list(windows(corpus))
    assert len(cut) > 15
    assert {row for window in cut for row in range(window.first_row, window.first_row + len(window.rows))} == set(
        range(len(corpus))
    )
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    result = look_for(corpus, [file], open_index([file]))
    assert result.benchmarks[0].found == len(QUESTIONS)
    for each in result.found:
        start = text.index(QUESTIONS[each.item])
        assert start // 40 - 1 <= each.row <= (start + len(QUESTIONS[each.item])) // 40 + 1


def test_rows_are_cut_inside_of_words_and_characters() -> None:
    tokenizer = byte_tokenizer()
    text = "eins zwölf größer ein 中文 Ende"
    ids = np.array(tokenizer.encode(text).ids, np.uint32)
    for size in range(1, 12):
        rows = tuple(ids[at : at + size] for at in range(0, len(ids), size))
        window = Window(0, 0, rows)
        (words,) = words_of(tokenizer, [window.ids()])
        assert len(words) == 7
        spans = rows_of_words(tokenizer, window, words)
        assert spans[0, 0] == 0
        assert spans[-1, 1] == 7
        assert (spans[1:, 0] <= spans[:-1, 1]).all()  # a word in two rows, or the next
        assert (spans[1:, 0] >= spans[:-1, 1] - 1).all()


def test_the_command_names_benchmark_item_and_row_and_flags_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, corpus = make_corpus(tmp_path / "c", texts=planted(topics(20, characters=1000), QUESTIONS[:3]))
    file = write_items(tmp_path / "bench.jsonl", [*QUESTIONS, "Why?"])
    arguments = ("--cache", tmp_path / "c", "--corpus", "docs", "--against", file)
    assert run_command(command, *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["benchmarks"][0] | {"sha256": ""} == {
        "name": "bench.jsonl",
        "sha256": "",
        "items": 13,
        "not_looked_for": 1,
        "found": 3,
        "with_answer": 0,
        "rows": told["rows_with_items"],
    }
    assert {(each["benchmark"], each["item"]) for each in told["found"]} == {("bench.jsonl", n) for n in range(3)}
    flags = corpus.annotation("contaminated")
    assert np.flatnonzero(flags).tolist() == sorted({each["row"] for each in told["found"]})
    provenance = open_annotation(cache.root, corpus.annotated, "contaminated").provenance
    assert provenance["source"] == "runs of 13 words of bench.jsonl"
    assert json.loads(provenance["report"])["benchmarks"] == told["benchmarks"]
    again = refusal(command, *arguments)
    assert again == (
        "corpus 'docs' has an annotation 'contaminated', which stays as it is; give another name, such as --name "
        f"contaminated-2, or remove it by potstill delete {cache.root.url} --corpus docs --annotation contaminated"
    )
    assert run_command(command, *arguments, "--name", "contaminated-again") == 0
    said = capsys.readouterr().out
    assert "item 0 of bench.jsonl" in said
    assert "annotation contaminated-again of corpus docs" in said
    assert said.endswith("rows with items of benchmarks, which training leaves out\n")
    assert run_command(command, *arguments, "--name", "bench") == 0
    assert "which training does not leave out, as the name is not contaminated-" in capsys.readouterr().out
    assert "such as --name bench-2, or" in refusal(command, *arguments, "--name", "bench")


def test_what_a_machine_wrote_is_searched_as_any_text(tmp_path: Path) -> None:
    """Rows of ids without documents, as a journal's become."""
    tokenizer = byte_tokenizer()
    texts = planted(topics(6, characters=300), QUESTIONS[:2])
    rows = [np.array(tokenizer.encode(text).ids, np.uint32) for text in texts]
    cache = Cache.open(tmp_path / "c", mode="r+")
    corpus = ingest_rows(cache.root, "asked", rows, tokenizer, IngestPlan(row_tokens=1000))
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    result = look_for(corpus, [file], open_index([file]))
    assert [(each.row, each.item) for each in result.found] == [(0, 0), (1, 1)]


def test_an_answer_beside_its_question_is_told(tmp_path: Path) -> None:
    texts = [f"{QUESTIONS[0]} The answer is: 0 litres and no more.", f"{QUESTIONS[1]} Nobody knows."]
    _, corpus = make_corpus(tmp_path / "c", texts=texts, row_tokens=1000)
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    result = look_for(corpus, [file], open_index([file]))
    assert [(each.item, each.with_answer) for each in result.found] == [(0, True), (1, False)]
    assert result.benchmarks[0].with_answer == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ngram", "0"], "--ngram is 0; it must be 1 to 100"),
        (["--name", "a b"], "annotation name 'a b'"),
        (["--field", "text"], "has no text under 'text'; it has question, answer: name one with --field"),
    ],
)
def test_wrong_options(tmp_path: Path, more: list[str], message: str) -> None:
    make_corpus(tmp_path / "c")
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    said = refusal(command, "--cache", tmp_path / "c", "--corpus", "docs", "--against", file, *more)
    assert message in said


def test_wrong_files(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    (tmp_path / "other").mkdir()
    files = [write_items(folder / "bench.jsonl", ["Why?"]) for folder in (tmp_path, tmp_path / "other")]
    arguments = ("--cache", tmp_path / "c", "--corpus", "docs", "--against")
    assert "two benchmarks are called 'bench.jsonl'" in refusal(command, *arguments, *files)
    short = refusal(command, *arguments, files[0])
    assert short.startswith("no item of bench.jsonl has the 8 words that are looked for")
    assert short.endswith("fewer are by a lower --ngram")
    elsewhere = ("--cache", tmp_path / "none", "--corpus", "docs", "--against", files[0])
    assert "the folder does not exist" in refusal(command, *elsewhere)
    assert not (tmp_path / "none").exists()
    assert "there is no file" in refusal(command, *arguments, tmp_path / "x.json")
    (tmp_path / "own.jsonl").write_text('{"body": "x"}')
    assert "name that of the question with --field F" in refusal(command, *arguments, tmp_path / "own.jsonl")


def test_conversations_are_searched_without_their_control_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|end|>"])
    words = QUESTIONS[0].split()
    half = len(words) // 2
    ids = [*tokenizer.encode(" ".join(words[:half])).ids, 256, *tokenizer.encode(" " + " ".join(words[half:])).ids]
    cache = Cache.open(tmp_path / "c", mode="r+")
    plan = IngestPlan(row_tokens=1000)
    corpus = ingest_rows(cache.root, "talks", [np.array(ids, np.uint32)], tokenizer, plan)
    file = write_items(tmp_path / "bench.jsonl", QUESTIONS)
    assert look_for(corpus, [file], open_index([file])).rows.tolist() == [True]
