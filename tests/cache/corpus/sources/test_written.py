"""Documents of JSON files, and records that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.cache.corpus.sources import written
from potstill.cache.errors import InvalidInput, LimitExceeded
from tests.support.command_line import run
from tests.support.corpora import byte_tokenizer, texts_of

RECORDS = [{"text": f"record {number} “{'x' * (number * 37 % 900)}”", "n": [number]} for number in range(2000)]
TEXTS = [str(record["text"]) for record in RECORDS]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_file_is_an_array_lines_or_records_one_after_the_other(
    tmp_path: Path, indent: int | None, mark: str
) -> None:
    path = tmp_path / "a.json"
    array = json.dumps(RECORDS, indent=indent)
    one_by_one = "\n".join(json.dumps(record, indent=indent) for record in RECORDS)
    for content in (array, f"\n {array}\n", one_by_one, f"\n{one_by_one}\n"):
        path.write_text(mark + content, encoding="utf-8")
        assert texts_of(path) == TEXTS
    path.write_text(mark + json.dumps(RECORDS[0], indent=indent), encoding="utf-8")
    assert texts_of(path) == TEXTS[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {broken]', "is not JSON: Expecting property name"),
        ('[{"text": "a"}', "is not JSON: an array without an end"),
        ('[{"text": "a"} {"text": "b"}]', "is not JSON: no comma between records"),
        ('[{"text": "a"}] x', "is not JSON: there is more after its array"),
        ('[{"text": "a"}, {"text": null}]', r"a\.json: record 1 has no text under 'text'; mend"),
        ('[{"text": "a"}, 3]', r"a\.json: record 1 is no object with a key 'text'"),
        ('[{"text": "a"}, {"text": 3}]', r"a\.json: record 1 has 3 under 'text', which is no text"),
        ('{"text": "a"}\n{"text": 3}', r"a\.json:2 has 3 under 'text'"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InvalidInput, match=message):
        texts_of(tmp_path / "a.json")


def test_a_number_is_not_parted_where_the_text_read_so_far_ends(tmp_path: Path) -> None:
    for before in range(written._PIECE_BYTES - 4, written._PIECE_BYTES):
        (tmp_path / "a.json").write_text("[" + " " * before + '1234, {"text": "a"}]')
        assert texts_of(tmp_path / "a.json", skip_bad=True) == ["a"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_has_a_bound(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MOST_RECORD_BYTES", 1 << 20)
    (tmp_path / name).write_text(json.dumps({"text": "x" * (3 << 20)}))
    with pytest.raises(LimitExceeded, match="has over 1 MiB in one record; part it"):
        texts_of(tmp_path / name)
    (tmp_path / "many.json").write_text(json.dumps([{"text": "x" * 9000}] * 999))
    assert len(texts_of(tmp_path / "many.json")) == 999


BAD_LINES = b"""{"text": "good"}
{"text": null}
{"body": "x"}
{"text": 7}
{broken
{"text": "\xff"}
{"text": "\\ud800"}
"a string"

{"text": "also good"}
"""


def test_bad_lines_are_named_or_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    lines = BAD_LINES.splitlines(keepends=True)
    says = ["no text under", "no text under", "has 7 under", "is not JSON", "is not UTF-8", "half a", "no object"]
    for line, said in zip(lines[1:8], says, strict=True):
        path.write_bytes(lines[0] + line)
        with pytest.raises(InvalidInput, match=rf"a\.jsonl:2 .*{said}.*; mend it, or leave .* out with --skip-bad"):
            texts_of(path)
    path.write_bytes(BAD_LINES)
    assert texts_of(path, skip_bad=True) == ["good", "also good"]
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    command = ["ingest", path, "--cache", tmp_path / "c", "--corpus", "docs", "--tokenizer", tmp_path, "--skip-bad"]
    assert run(*command) == 0
    assert f"7 bad records left out (first: {path}:2 has no text under 'text'" in capsys.readouterr().out


def test_a_text_file_that_is_not_utf8_is_named_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"good " * (written._PIECE_BYTES // 4) + b"\xff")
    told = (
        rf"b\.txt is not UTF-8: .* at byte {written._PIECE_BYTES // 4 * 5}; convert it, as by iconv .* with --skip-bad"
    )
    with pytest.raises(InvalidInput, match=told):
        texts_of(folder)
    assert texts_of(folder, skip_bad=True) == ["good"]
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    command = ["ingest", folder, "--cache", tmp_path / "c", "--corpus", "docs", "--tokenizer", tmp_path, "--skip-bad"]
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "4 positions in 1 row and 1 shard from 1 document of 2 files" in said
    assert f"1 bad record left out (first: {folder}/b.txt is not UTF-8" in said
    (tmp_path / "a.json").write_bytes(b'[{"text": "good"}, {"text": "\xff"}]')  # no line says where the next begins
    with pytest.raises(InvalidInput, match=r"a\.json is not UTF-8: .*; convert it, as by iconv .*, or take it out"):
        texts_of(tmp_path / "a.json", skip_bad=True)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"id": 1, "body": "x"}, "has no text under 'text'; it has id, body: name one with --text-field;"),
        ({"id": 1, "messages": []}, "it has id, messages: name one with --messages-field messages;"),
        ({"input_ids": [1]}, "it has input_ids: name one with --ids-field input_ids;"),
        ({"text": [{"role": "user", "content": "x"}]}, "which is no text; --messages-field text reads it;"),
    ],
)
def test_a_record_without_text_is_told_what_it_has(tmp_path: Path, record: dict[str, object], told: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match=told):
        texts_of(tmp_path / "a.jsonl")
