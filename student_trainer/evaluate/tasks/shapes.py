"""Shapes of files of questions, as their publishers write them, told by the fields of a row.

Each names the harness's own tasks for it, whose prompts and scores it keeps, and turns a row into what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
"""One question with its answers."""

_LETTERS = ("A", "B", "C", "D")
_NO_OTHER_SPLIT: dict[str, Any] = {"training_split": None, "validation_split": None, "test_split": "test"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write questions with their answers."""

    name: str
    fields: tuple[str, ...]
    """What tells it; all that a row must have."""
    tasks: Mapping[str, str]
    """YAML of each of the harness's tasks, below its folder of tasks, by what is added to the file's name."""
    row: Callable[[Row], dict[str, Any]]
    """Check a row and turn it into what the tasks read. Raises ValueError."""
    settings: Mapping[str, Any] = field(default_factory=lambda: _NO_OTHER_SPLIT)
    """Settings that replace the YAML's own."""


def shape_of(fields: Collection[str]) -> Shape | None:
    """Tell the shape of a row that has these fields; None where it is none that is known."""
    return next((shape for shape in SHAPES if set(shape.fields) <= set(fields)), None)


def _truthful(row: Row) -> dict[str, Any]:
    mc1, mc2 = (_targets(row, name) for name in ("mc1_targets", "mc2_targets"))
    if sum(mc1["labels"]) != 1:
        raise ValueError(f"mc1_targets has {sum(mc1['labels'])} choices of label 1, and needs one")
    if not any(mc2["labels"]):
        raise ValueError("mc2_targets has no choice of label 1")
    # The harness takes the first choice of mc1 for the right one.
    right = mc1["labels"].index(1)
    choices = [mc1["choices"][right], *mc1["choices"][:right], *mc1["choices"][right + 1 :]]
    mc1 = {"choices": choices, "labels": [1, *[0] * (len(choices) - 1)]}
    return {"question": _text(row["question"], "question"), "mc1_targets": mc1, "mc2_targets": mc2}


def _targets(row: Row, name: str) -> dict[str, list[Any]]:
    """Read choices with labels, which the first publication has as one object from choice to label."""
    found = row[name]
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} is no object")  # noqa: TRY004 -- the one error of a row
    if set(found) != {"choices", "labels"}:
        found = {"choices": list(found), "labels": list(found.values())}
    choices, labels = _texts(found["choices"], f"{name}.choices"), found["labels"]
    if not isinstance(labels, list) or len(labels) != len(choices) or any(label not in (0, 1) for label in labels):
        raise ValueError(f"{name}.labels are not a 0 or 1 for each choice")
    return {"choices": choices, "labels": [int(label) for label in labels]}


def _arc(row: Row) -> dict[str, Any]:
    question, choices = row["question"], row.get("choices")
    if isinstance(question, Mapping):  # as it was first published
        listed = question.get("choices")
        rows = listed if isinstance(listed, list) and all(isinstance(each, Mapping) for each in listed) else []
        choices = {name: [each.get(name) for each in rows] for name in ("text", "label")}
        question = question.get("stem")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ValueError("choices have no text and label")
    texts, labels = _texts(choices["text"], "choices.text"), _texts(choices["label"], "choices.label")
    if len(texts) != len(labels):
        raise ValueError(f"choices have {len(texts)} texts and {len(labels)} labels")
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {', '.join(labels)}")
    choices = {"text": texts, "label": labels}
    return {"question": _text(question, "question"), "choices": choices, "answerKey": row["answerKey"]}


def _mmlu(row: Row) -> dict[str, Any]:
    choices, answer = _texts(row["choices"], "choices"), row["answer"]
    if len(choices) != len(_LETTERS):
        raise ValueError(f"there are {len(choices)} choices; MMLU has {len(_LETTERS)}")
    if answer in _LETTERS:
        answer = _LETTERS.index(answer)
    if type(answer) is not int or not 0 <= answer < len(_LETTERS):
        raise ValueError(f"answer {answer!r} is neither 0 to 3 nor A to D")
    return {
        "question": _text(row["question"], "question"),
        "choices": choices,
        "answer": answer,
        "about": f" about {row['subject'].replace('_', ' ')}" if isinstance(row.get("subject"), str) else "",
    }


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is no list of texts")
    # An empty choice has no tokens, and a score for its length divides by zero.
    return [_text(each, f"{name}[{at}]") for at, each in enumerate(value)]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")  # noqa: TRY004 -- the one error of a row
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


SHAPES = (
    Shape(
        "TruthfulQA",
        ("question", "mc1_targets", "mc2_targets"),
        {"_mc1": "truthfulqa/truthfulqa_mc1.yaml", "_mc2": "truthfulqa/truthfulqa_mc2.yaml"},
        _truthful,
    ),
    Shape("ARC", ("question", "answerKey"), {"": "arc/arc_easy.yaml"}, _arc),
    Shape(
        "MMLU",
        ("question", "choices", "answer"),
        {"": "mmlu/default/_default_template_yaml"},
        _mmlu,
        # The YAML of each subject adds this description; examples would be of another split.
        {
            **_NO_OTHER_SPLIT,
            "description": "The following are multiple choice questions (with answers){{about}}.\n\n",
            "fewshot_split": None,
            "fewshot_config": None,
        },
    ),
)
"""Those that are known."""
