"""Files of questions become tasks by their fields, or are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.evaluate.tasks.questions import write_tasks
from potstill.student_trainer.evaluate.tasks.shapes import SHAPES
from tests.student_trainer.evaluate.tasks.question_files import QUESTIONS, arc, mmlu, truthful, write_jsonl

Rows = list[dict[str, Any]]


def written(folder: Path) -> dict[str, Rows]:
    into = folder.parent / "into"
    into.mkdir()
    write_tasks(folder, into, Path("/harness"))
    return {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in into.glob("*.jsonl")
    }


def refused(folder: Path, rows: Rows) -> str:
    write_jsonl(folder / "tasks" / "bad.jsonl", rows)
    with pytest.raises(InvalidInput) as raised:
        written(folder / "tasks")
    assert "\n" not in raised.value.detail
    return raised.value.detail


def test_each_file_is_the_task_of_its_shape(tmp_path: Path) -> None:
    for name, rows in (("truth", truthful()), ("science", arc()), ("exam", mmlu())):
        write_jsonl(tmp_path / "tasks" / f"{name}.jsonl", rows)
    found = written(tmp_path / "tasks")
    tasks = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "into").glob("*.yaml")}
    assert {name: task["include"] for name, task in tasks.items()} == {
        "truth_mc1": "/harness/truthfulqa/truthfulqa_mc1.yaml",
        "truth_mc2": "/harness/truthfulqa/truthfulqa_mc2.yaml",
        "science": "/harness/arc/arc_easy.yaml",
        "exam": "/harness/mmlu/default/_default_template_yaml",
    }
    assert found["truth"] == truthful()
    assert [row["answerKey"] for row in found["science"]] == ["A"] * len(QUESTIONS)
    assert {row["about"] for row in found["exam"]} == {" about abstract algebra"}


def test_first_publications_of_truthfulqa_and_arc_are_the_same_questions(tmp_path: Path) -> None:
    mc = [
        {"question": row["question"]}
        | {
            name: dict(zip(row[name]["choices"], row[name]["labels"], strict=True))
            for name in ("mc1_targets", "mc2_targets")
        }
        for row in truthful()
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "truth.json").write_text(json.dumps(mc, indent=1), encoding="utf-8")
    stems = [
        {
            "id": row["id"],
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in arc()
    ]
    write_jsonl(tmp_path / "tasks" / "science.jsonl", stems)
    found = written(tmp_path / "tasks")
    assert found["truth"] == truthful()
    assert found["science"] == [{name: row[name] for name in ("question", "choices", "answerKey")} for row in arc()]


def test_the_right_choice_of_mc1_comes_first_as_the_harness_takes_it_to(tmp_path: Path) -> None:
    row = truthful()[0]
    row["mc1_targets"] = {"choices": ["no", "neither", "yes", "nor"], "labels": [0, 0, 1, 0]}
    write_jsonl(tmp_path / "tasks" / "truth.jsonl", [row])
    (found,) = written(tmp_path / "tasks")["truth"]
    assert found["mc1_targets"] == {"choices": ["yes", "no", "neither", "nor"], "labels": [1, 0, 0, 0]}


def test_letters_of_mmlu_are_numbers(tmp_path: Path) -> None:
    rows = [{**row, "answer": "ABCD"[row["answer"]], "subject": None} for row in mmlu()]
    write_jsonl(tmp_path / "tasks" / "exam.jsonl", rows)
    found = written(tmp_path / "tasks")["exam"]
    assert [row["answer"] for row in found] == [row["answer"] for row in mmlu()]
    assert {row["about"] for row in found} == {""}


def test_a_file_of_an_unknown_shape_is_refused_with_its_fields_and_the_known_shapes(tmp_path: Path) -> None:
    told = refused(tmp_path, [{"premise": "a", "hypothesis": "b"}])
    assert "bad.jsonl' is of no known shape: its fields are premise, hypothesis. " in told
    for shape in SHAPES:
        assert f"{shape.name} ({', '.join(shape.fields)})" in told


@pytest.mark.parametrize(
    ("rows", "change", "told"),
    [
        (truthful, {"mc1_targets": {"choices": ["a", ""], "labels": [1, 0]}}, "mc1_targets.choices[1] is empty"),
        (truthful, {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "mc1_targets has 2 choices of label 1"),
        (truthful, {"mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "not a 0 or 1 for each choice"),
        (truthful, {"mc2_targets": {"choices": ["a"], "labels": [0]}}, "mc2_targets has no choice of label 1"),
        (truthful, {"mc2_targets": ["a"]}, "mc2_targets is no object"),
        (arc, {"answerKey": "E"}, "answerKey 'E' is none of the labels A, B, C"),
        (arc, {"choices": {"text": ["a", " "], "label": ["A", "B"]}}, "choices.text[1] is empty"),
        (arc, {"choices": {"text": ["a"], "label": ["A", "B"]}}, "choices have 1 texts and 2 labels"),
        (arc, {"question": {"stem": "a", "choices": "b"}}, "choices.text is no list of texts"),
        (mmlu, {"choices": ["a", "b", "c"]}, "there are 3 choices; MMLU has 4"),
        (mmlu, {"answer": 4}, "answer 4 is neither 0 to 3 nor A to D"),
        (mmlu, {"answer": True}, "answer True is neither"),
        (mmlu, {"question": 3}, "question is no text"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, rows: Callable[[], Rows], change: dict[str, Any], told: str) -> None:
    good, bad = rows()[:2]
    line = refused(tmp_path, [good, {**bad, **change}])
    assert "bad.jsonl', question 2, in " in line
    assert told in line


def test_a_question_that_lacks_a_field(tmp_path: Path) -> None:
    first, second = mmlu()[:2]
    del second["answer"]
    assert refused(tmp_path, [first, second]).endswith("question 2, in MMLU's shape: it has no answer")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no questions"),
        ("{", "bad.json is not JSON"),
        ("[1]", "has '1', which is no object"),
        ("\x80", "bad.json: is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match="bad.json") as raised:
        written(tmp_path / "tasks")
    assert told in raised.value.detail


def test_a_folder_with_nothing_to_ask_and_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    with pytest.raises(InvalidInput, match="has neither tasks of the harness"):
        write_tasks(tmp_path / "tasks", tmp_path, Path("/harness"))
    for ending in ("json", "jsonl"):
        write_jsonl(tmp_path / "tasks" / f"exam.{ending}", mmlu())
    with pytest.raises(InvalidInput, match="'exam', as another file does; rename it"):
        written(tmp_path / "tasks")
