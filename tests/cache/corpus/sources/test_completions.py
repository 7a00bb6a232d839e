"""Records of what models wrote, in the shapes in which people have them."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.cache.corpus.sources import BadRecords, Completion, Field, documents, list_sources
from potstill.cache.corpus.sources.completions import prompt_hash, seconds
from potstill.cache.errors import InvalidInput

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a still?"}]
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1717171717,
    "model": "gpt-4-0613",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A vessel."}, "finish_reason": "stop"}],
}
FLAT = {"prompt": "What?", "completion": "A vessel.", "model": "gpt-4", "created": 1717171717}
FIELD = Field("completion", "")


def read(path: Path, field: Field = FIELD, *, skip: bool = False) -> list[Any]:
    bad = BadRecords(skip=skip)
    (file,) = list_sources([path], field)[0]
    return list(documents(file, field, bad, vocab_size=64))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "prompt", "model"),
    [
        (FLAT, "What?", "gpt-4"),
        ({"prompt": "What?", "response": "A vessel.", "model": "m", "created": "2024-05-31T16:08:37Z"}, "What?", "m"),
        ({"messages": ASKED, **CHAT}, ASKED, "gpt-4-0613"),
        ({"request": {"model": "gpt-4", "messages": ASKED}, "response": CHAT}, ASKED, "gpt-4-0613"),
        ({"body": {"model": "gpt-4", "messages": ASKED}, "response": {"body": CHAT}}, ASKED, "gpt-4-0613"),
        ({"custom_id": "1", "response": {"status_code": 200, "body": CHAT}, "error": None}, None, "gpt-4-0613"),
        (
            {"request": {"prompt": "What?"}, "response": {**CHAT, "choices": [{"text": "A vessel."}]}},
            "What?",
            "gpt-4-0613",
        ),
        ({**FLAT, "prompt": ASKED, "completion": [{"role": "assistant", "content": "A vessel."}]}, ASKED, "gpt-4"),
    ],
)
def test_a_record_is_read_in_each_shape(tmp_path: Path, record: Any, prompt: Any, model: str) -> None:
    (found,) = read(write(tmp_path / "a.jsonl", record))
    assert found == Completion(f"{tmp_path / 'a.jsonl'}:1", prompt, "A vessel.", model, 1717171717)


def test_parquet_has_the_documents_and_hashes_of_json(tmp_path: Path) -> None:
    named = [{"role": "user", "content": "And?", "name": "ann"}]
    records = [{"request": {"messages": asked}, "response": CHAT} for asked in (ASKED, named)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    ours, theirs = read(tmp_path / "a.parquet"), read(write(tmp_path / "a.jsonl", *records))
    assert [each.prompt for each in ours] == [ASKED, named]
    assert list(map(prompt_hash, (each.prompt for each in ours))) == [prompt_hash(each.prompt) for each in theirs]
    when = dt.datetime(2024, 5, 31, 16, 8, 37, tzinfo=dt.UTC)
    pq.write_table(pa.Table.from_pylist([{**FLAT, "created": when}]), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0].created == 1717171717


def test_a_hash_is_the_first_bytes_of_sha256() -> None:
    assert f"{prompt_hash('Was?'):016x}" == hashlib.sha256(b"Was?").hexdigest()[:16]
    text = '[{"content":"ß","role":"user"}]'
    assert f"{prompt_hash([{'role': 'user', 'content': 'ß'}]):016x}" == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert prompt_hash(None) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1717171717.9, 1717171717),
        ("2024-05-31", 1717113600),
        ("2024-05-31T18:08:37+02:00", 1717171717),
        (1717171717000, None),
        ("yesterday", None),
        (True, None),
        (float("nan"), None),
        ([], None),
    ],
)
def test_times_are_seconds_or_iso_8601(value: Any, expected: int | None) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"a\.jsonl:1 has no 'model': name what wrote it with --written-by NAME; mend it, or"),
        ({"model": 4}, r"has a 'model' that is no name of up to 256 printable characters"),
        ({"model": "a\x1b[2J"}, r"has a 'model' that is no name of up to 256 printable characters"),
        ({"created": None}, r"a\.jsonl:1 has no time under 'created': say when it was written with --written-at TIME"),
        ({"created": 1717171717000}, r"has '1717171717000' under 'created', which is no time: give seconds since"),
        ({"completion": None}, r"has no text under 'completion' or 'response', or in 'choices'; mend"),
        ({"completion": ""}, r"has no text under 'completion'"),
        ({"completion": "\ud800"}, r"has half a surrogate pair"),
        ({"completion": None, "error": {"code": "429"}}, r"in 'choices' but the error \{\"code\": \"429\"\}"),
        ({"completion": None, "choices": [{}, {}]}, r"has 2 choices; write a record for each answer"),
        ({"prompt": ["a"]}, r"has a prompt under 'prompt' that is neither a text nor a list of messages"),
        ({"prompt": [{"content": "a"}]}, r"has no role in message 0"),
    ],
)
def test_a_record_without_a_part_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(write(tmp_path / "a.jsonl", FLAT | change))
    assert read(tmp_path / "a.jsonl", skip=True) == []


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no object with a prompt and a completion"):
        read(write(tmp_path / "a.jsonl", ["a"]))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InvalidInput, match=r"'.*a\.txt' is not \.jsonl, \.ndjson, \.json, \.parquet or \.arrow"):
        read(tmp_path / "a.txt")


def test_records_without_model_or_time_take_what_is_given(tmp_path: Path) -> None:
    bare = {"prompt": "What?", "completion": "A vessel."}
    field = Field("completion", "", written_by="gpt-4", written_at=5)
    bare_found, own = read(write(tmp_path / "a.jsonl", bare, {**FLAT, "model": "other"}), field)
    assert (bare_found.model, bare_found.created) == ("gpt-4", 5)
    assert (own.model, own.created) == ("other", 1717171717)
