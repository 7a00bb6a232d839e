"""Tasks of the harness made of files of questions, in its own YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_json_records
from potstill.student_trainer.evaluate.tasks.shapes import SHAPES, Row, Shape, shape_of

_ENDINGS = (".json", ".jsonl")


def write_tasks(folder: Path, into: Path, harness: Path) -> None:
    """Write a task for each file of questions in a folder, named as the file is.

    Args:
        folder: with files of a known shape, as JSON (one list) or JSONL.
        into: folder for the YAML and the questions, empty.
        harness: folder of the harness's own tasks, which these include.

    Raises:
        InvalidInput: there are no files, two have one name, or one is of no known shape or has a bad row.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    if not files:
        raise InvalidInput(
            f"{str(folder)!r} has neither tasks of the harness (*.yaml) nor files of questions (*.json, *.jsonl)"
        )
    for file in files:
        shape, rows = _read(file)
        questions = into / f"{file.stem}.jsonl"
        for ending, yaml in shape.tasks.items():
            name = file.stem + ending
            task = into / f"{name}.yaml"
            if task.exists():
                raise InvalidInput(f"{str(file)!r} makes a task {name!r}, as another file does; rename it")
            # JSON is YAML, too.
            task.write_text(
                json.dumps(
                    {
                        "include": str(harness / yaml),
                        "task": name,
                        "tag": None,
                        "dataset_path": "json",
                        "dataset_name": None,
                        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(into / "read")},
                        **shape.settings,
                    },
                    ensure_ascii=False,
                ),
                encoding="utf-8",
            )
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read(file: Path) -> tuple[Shape, list[dict[str, Any]]]:
    """Read a file's questions and tell their shape.

    Raises:
        InvalidInput: it cannot be read, is of no known shape, or a row is not of the first one's.
    """
    rows = list(_rows(file))
    if not rows:
        raise InvalidInput(f"{str(file)!r} has no questions")
    shape = shape_of(rows[0])
    if shape is None:
        known = "; ".join(f"{each.name} ({', '.join(each.fields)})" for each in SHAPES)
        raise InvalidInput(
            f"{str(file)!r} is of no known shape: its fields are {', '.join(rows[0]) or 'none'}. Known are {known}; "
            "for others put a task of the harness (*.yaml) into the folder"
        )
    found = []
    for number, row in enumerate(rows, 1):
        try:
            lacking = [name for name in shape.fields if name not in row]
            if lacking:
                raise ValueError(f"it has no {', '.join(lacking)}")
            found.append(shape.row(row))
        except ValueError as error:
            raise InvalidInput(f"{str(file)!r}, question {number:,}, in {shape.name}'s shape: {error}") from error
    return shape, found


def _rows(file: Path) -> Iterator[Row]:
    for row in read_json_records(file):
        if not isinstance(row, dict):
            raise InvalidInput(f"{str(file)!r} has {str(row)[:40]!r}, which is no object and so no question")
        yield row
