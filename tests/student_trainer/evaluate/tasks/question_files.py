"""Small files of questions in the shapes of TruthfulQA, ARC and MMLU, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = (
    ("What is a name?", "a reference to an object"),
    ("What does a loop do?", "it repeats a block"),
    ("Where does a string end?", "at its quote"),
    ("Which object has a type?", "every one of them"),
    ("What is raised?", "an exception"),
    ("When is a module imported?", "at its first use"),
)


def choices(at: int, number: int = 4) -> list[str]:
    """Answers to question `at`, the right one first."""
    return [QUESTIONS[(at + step) % len(QUESTIONS)][1] for step in range(number)]


def truthful() -> list[dict[str, Any]]:
    rows = []
    for at, (question, _) in enumerate(QUESTIONS):
        mc1 = {"choices": choices(at), "labels": [1, 0, 0, 0]}
        mc2 = {"choices": [*choices(at), "nobody can say"], "labels": [1, 0, 0, 0, 1]}
        rows.append({"question": question, "mc1_targets": mc1, "mc2_targets": mc2})
    return rows


def arc() -> list[dict[str, Any]]:
    rows = []
    for at, (question, _) in enumerate(QUESTIONS):
        answers = {"text": choices(at, 3 + at % 2), "label": list("ABCD")[: 3 + at % 2]}
        rows.append({"id": f"q{at}", "question": question, "choices": answers, "answerKey": "A"})
    return rows


def mmlu() -> list[dict[str, Any]]:
    rows = []
    for at, (question, answer) in enumerate(QUESTIONS):
        turned = choices(at)[-(at % 4) :] + choices(at)[: -(at % 4)]
        subject = "abstract_algebra"
        rows.append({"question": question, "subject": subject, "choices": turned, "answer": turned.index(answer)})
    return rows


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
