"""Benchmark files in the shapes that they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.text.benchmark_items import Item, read_items

QUESTION = "What comes over first?"
TRUTHFUL = {
    "best_answer": "The heads.",
    "correct_answers": ["The heads.", "The foreshots."],
    "incorrect_answers": ["x"],
}
CHOICES = ["The tails", "The heads"]


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"question": QUESTION, **TRUTHFUL}, ("The heads.", "The foreshots.")),
        ({"question": QUESTION, "mc1_targets": {"choices": CHOICES, "labels": [0, 1]}}, ("The heads",)),
        ({"question": QUESTION, "mc1_targets": {"The tails": 0, "The heads": 1}}, ("The heads",)),
        ({"question": QUESTION, "choices": {"text": CHOICES, "label": ["A", "B"]}, "answerKey": "B"}, ("The heads",)),
        ({"question": QUESTION, "choices": {"text": CHOICES, "label": ["1", "2"]}, "answerKey": "2"}, ("The heads",)),
        (
            {
                "question": {
                    "stem": QUESTION,
                    "choices": [{"text": text, "label": label} for text, label in zip(CHOICES, "AB", strict=True)],
                },
                "answerKey": "B",
            },
            ("The heads",),
        ),
        ({"question": QUESTION, "subject": "s", "choices": CHOICES, "answer": 1}, ("The heads",)),
        ({"question": QUESTION, "choices": CHOICES, "answer": "B"}, ("The heads",)),
        ({"question": QUESTION, "options": CHOICES, "answer": "The heads"}, ("The heads",)),
        ({"question": QUESTION, "answer": "The heads, of 5%. #### 5"}, ("The heads, of 5%. #### 5",)),
        ({"ctx": QUESTION, "endings": CHOICES, "label": "1"}, ("The heads",)),
        ({"prompt": QUESTION, "canonical_solution": "return heads"}, ("return heads",)),
        ({"problem": QUESTION, "solution": "heads"}, ("heads",)),
        ({"Question": QUESTION, "Best Answer": "The heads"}, ("The heads",)),
        ({"question": QUESTION}, ()),
        ({"question": QUESTION, "choices": CHOICES}, ()),
        ({"question": QUESTION, "choices": CHOICES, "answer": -1}, ()),  # as hidden answers are published
        ({"ctx": QUESTION, "endings": CHOICES, "label": ""}, ()),
        ({"question": QUESTION, "choices": "odd", "answer": "B"}, ()),
    ],
)
def test_shapes_of_records(tmp_path: Path, record: dict[str, Any], answers: tuple[str, ...]) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text(json.dumps(record) + "\n\n")
    assert read_items(file) == [Item("bench.jsonl", 0, QUESTION, answers)]


def test_kinds_of_files(tmp_path: Path) -> None:
    records = [{"question": QUESTION, "answer": "heads"}, {"question": "2 + 2?", "answer": "4"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "c2.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "d.csv").write_text("question,answer\nWhat comes over first?,heads\n2 + 2?,4\n")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert read_items(file) == [
            Item(file.name, 0, QUESTION, ("heads",)),
            Item(file.name, 1, "2 + 2?", ("4",)),
        ]


def test_a_list_of_one_item_whose_choices_are_objects(tmp_path: Path) -> None:
    choices = [{"label": "A", "text": "tails"}, {"label": "B", "text": "heads"}]
    file = tmp_path / "one.json"
    for record, fields in (
        ({"question": QUESTION, "choices": choices, "answerKey": "B"}, []),
        ({"Task": QUESTION, "choices": choices, "right": "heads"}, ["Task", "right"]),
    ):
        for text in (json.dumps([record]), json.dumps(record)):
            file.write_text(text)
            assert read_items(file, fields) == [Item("one.json", 0, QUESTION, ("heads",))]


def test_marks_that_other_software_takes_for_the_end_of_a_line(tmp_path: Path) -> None:
    """JSON lines end in line feeds alone; a text may hold any other mark."""
    file = tmp_path / "bench.jsonl"
    question = "What\u2028comes\x85first?"
    file.write_text(json.dumps({"question": question}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_items(file) == [Item("bench.jsonl", 0, question)]


def test_the_csv_of_truthfulqa_and_of_mmlu(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'Adversarial,Stills,"What, then, comes first?",Heads,Heads; The foreshots,Tails,none\n'
    )
    assert read_items(tmp_path / "t.csv") == [
        Item("t.csv", 0, "What, then, comes first?", ("Heads", "The foreshots")),
    ]
    (tmp_path / "m.csv").write_text('"First?\nOr last?",one,two,three,four,C\nAgain?,1,2,3,4,A\n')
    assert read_items(tmp_path / "m.csv") == [
        Item("m.csv", 0, "First?\nOr last?", ("three",)),
        Item("m.csv", 1, "Again?", ("1",)),
    ]


def test_fields_that_are_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"task": QUESTION, "gold": ["heads", "foreshots"], "question": "no"}))
    assert read_items(file, ["task", "gold"]) == [Item("own.jsonl", 0, QUESTION, ("heads", "foreshots"))]
    with pytest.raises(InvalidInput, match="item 0 has no text under 'tusk'; it has task, gold, question"):
        read_items(file, ["tusk"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"body": "x", "n": 1}', "item 0 has none of the fields question, .* it has body, n: name that of"),
        ("a.jsonl", "[1]", "item 0 is .* which is no object with fields"),
        ("a.jsonl", "{", "a.jsonl is not JSON"),
        ("a.jsonl", "{}\n{", "a.jsonl:2 is not JSON"),
        (
            "a.jsonl",
            '{"question": "x", "choices": ["a"], "answer": 0}\n{"question": "x", "choices": ["a", "b"], "answer": "C"}',
            "a.jsonl: item 1 has answer 'C', which is none of its 2 choices; mend it, or name the fields",
        ),
        ("a.json", "[]", "has no item"),
        ("a.csv", "", "has no item"),
        ("a.csv", 'a,"b', "is not CSV"),
        ("a.txt", "x", "is not .json, .jsonl, .csv or .parquet; convert it"),
        ("a.parquet", "x", "cannot be read as Parquet"),
        ("a.jsonl", '{"question": {"text": "x"}}', "name that of the question with --field F"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_items(tmp_path / name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is a folder; name the files in it, as .*/\*"):
        read_items(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl", "a.parquet"])
def test_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="there is no file"):
        read_items(tmp_path / name)
