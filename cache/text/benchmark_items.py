"""Items of benchmarks, read from files in the shapes that TruthfulQA, ARC, MMLU, GSM8K and others are published in."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_json_records, read_named
from potstill.cache.plurals import counted

_QUESTIONS = ("question", "prompt", "problem", "query", "ctx", "goal")
_ANSWERS = ("correct_answers", "best_answer", "answer", "canonical_solution", "solution", "target")
_CHOICES = ("choices", "options", "endings", "mc1_targets", "mc2_targets")
_KEYS = ("answerkey", "answer", "label", "gold")
_HIDDEN = (None, "", -1, "-1")  # as answers of test sets are published
_LETTERS = "abcdefghij"
_MMLU_COLUMNS = 6
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a benchmark: its question, and the texts of its right answers where they are known."""

    benchmark: str
    """Name of the file."""
    number: int
    """Its place in the file, from 0."""
    question: str
    answers: tuple[str, ...] = ()


def read_items(path: Path, fields: Sequence[str] = ()) -> list[Item]:
    """Read the items of a JSON, JSON lines, CSV or Parquet file.

    Args:
        path: the file.
        fields: keys of the question and of its answers, in place of those that are known.

    Raises:
        InvalidInput: the file cannot be read, has no item, or an item's question is not found.
    """
    items = [_item(path, number, record, fields) for number, record in enumerate(_records(path, fields))]
    if not items:
        raise InvalidInput(f"{path} has no item")
    return items


def _records(path: Path, fields: Sequence[str]) -> Iterator[Any]:
    if path.is_dir():
        raise InvalidInput(f"{str(path)!r} is a folder; name the files in it, as {path}/*")
    match path.suffix.lower():
        case ".json" | ".jsonl" | ".ndjson":
            found = read_json_records(path)
            yield from _in_object(found[0], fields) if path.suffix.lower() == ".json" and len(found) == 1 else found
        case ".csv":
            yield from _csv_records(read_named(path), path)
        case ".parquet":
            if not path.is_file():
                raise InvalidInput(f"there is no file {str(path)!r}")
            try:
                yield from pq.read_table(path).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise InvalidInput(f"{path} cannot be read as Parquet: {error}") from error
        case _:
            raise InvalidInput(f"{str(path)!r} is not .json, .jsonl, .csv or .parquet; convert it")


def _in_object(record: Any, fields: Sequence[str]) -> list[Any]:
    """Find the items in the one value of a file: a list in an object, as {"data": [...]}, or itself."""
    if not isinstance(record, dict) or not {*_QUESTIONS, *map(str.lower, fields)}.isdisjoint(map(str.lower, record)):
        return [record]
    lists = [value for value in record.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict) else [record]


def _csv_records(text: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True))
    except csv.Error as error:
        raise InvalidInput(f"{path} is not CSV: {error}") from error
    rows = [row for row in rows if row]
    letters = [row[-1].strip().lower() in tuple(_LETTERS[:4]) for row in rows if len(row) == _MMLU_COLUMNS]
    if letters and len(letters) == len(rows) and all(letters):  # MMLU's own files have no header
        names = ["question", *_LETTERS[:4], "answer"]
    else:
        names, rows = (rows[0], rows[1:]) if rows else ([], [])
    yield from (dict(zip(names, row, strict=False)) for row in rows)


def _item(path: Path, number: int, record: Any, fields: Sequence[str]) -> Item:
    where = f"{path}: item {number}"
    if not isinstance(record, dict):
        raise InvalidInput(f"{where} is {str(record)[:40]!r}, which is no object with fields")
    if fields:
        texts = [_named(record, name, where) for name in fields]
        return Item(path.name, number, "\n".join(texts[0]), tuple(text for each in texts[1:] for text in each))
    known = {str(key).lower().replace(" ", "_"): value for key, value in record.items()}
    nested = known.get("question")
    if isinstance(nested, Mapping) and isinstance(nested.get("stem"), str):  # ARC as it was first published
        known |= {"question": nested["stem"], "choices": nested.get("choices")}
    question = next((known[name] for name in _QUESTIONS if isinstance(known.get(name), str)), None)
    if question is None:
        have = ", ".join(map(str, list(record)[:_NAMED])) or "none"
        raise InvalidInput(
            f"{where} has none of the fields {', '.join(_QUESTIONS)}; it has {have}: name that of the question with "
            "--field F, and those of answers with further ones"
        )
    return Item(path.name, number, question, tuple(_answers(known, where)))


def _named(record: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = record.get(name)
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if not texts or len(texts) < len(values):
        have = ", ".join(map(str, list(record)[:_NAMED]))
        raise InvalidInput(f"{where} has no text under {name!r}; it has {have}: name one with --field")
    return texts


def _answers(record: Mapping[str, Any], where: str) -> Iterator[str]:
    """Texts of the right answers of a record, by lower-case keys; raises as `_right` does."""
    for name in _CHOICES:
        if record.get(name) is not None:
            yield from _right(record[name], record, where)
            return
    if isinstance(record.get("a"), str) and isinstance(record.get("b"), str):  # choices in columns of their own
        yield from _right([record[name] for name in _LETTERS if isinstance(record.get(name), str)], record, where)
        return
    for name in _ANSWERS:
        value = record.get(name)
        if name == "correct_answers" and isinstance(value, str):  # TruthfulQA's CSV
            value = value.split("; ")
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
        if texts:
            yield from texts
            return


def _right(choices: Any, record: Mapping[str, Any], where: str) -> Iterator[str]:
    """The right one of choices: texts or objects, lists of texts and labels side by side, or text to label.

    Raises:
        InvalidInput: what the record says is right is none of them; `where` names it.
    """
    texts, labels = choices, None
    if isinstance(choices, Mapping) and all(type(label) is int for label in choices.values()):  # TruthfulQA's own JSON
        texts, labels = list(choices), list(choices.values())
    elif isinstance(choices, Mapping):
        texts = choices.get("text", choices.get("choices"))
        labels = choices.get("label", choices.get("labels"))
    elif isinstance(choices, list) and all(isinstance(each, Mapping) for each in choices):
        texts, labels = [each.get("text") for each in choices], [each.get("label") for each in choices]
    if not isinstance(texts, list):
        return
    if isinstance(labels, list) and set(map(str, labels)) <= {"0", "1"}:  # TruthfulQA: 1 for each right one
        yield from (text for text, label in zip(texts, labels, strict=False) if label == 1 and isinstance(text, str))
        return
    name = next((name for name in _KEYS if record.get(name) not in _HIDDEN), None)
    if name is None:
        return
    place = _place(record[name], labels, texts)
    if place is None or not 0 <= place < len(texts):
        raise InvalidInput(
            f"{where} has {name} {str(record[name])[:40]!r}, which is none of its {counted(len(texts), 'choice')}; "
            "mend it, or name the fields of the question and of texts that are right with --field"
        )
    if isinstance(texts[place], str):
        yield texts[place]


def _place(key: Any, labels: Any, texts: list[Any]) -> int | None:
    """Place of the right choice, by its label, letter, number or text."""
    if isinstance(labels, list) and key in labels:
        return labels.index(key)
    if key in texts:
        return texts.index(key)
    if isinstance(key, str) and len(key.strip()) == 1 and key.strip().lower() in _LETTERS:
        return _LETTERS.index(key.strip().lower())
    if isinstance(key, int) or (isinstance(key, str) and key.isdecimal()):
        return int(key)
    return None
