"""Files of folders, by kind and compression."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.sources import Field, file_sha256, list_sources
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import Root
from tests.support.command_line import refused, run
from tests.support.corpora import byte_tokenizer, texts_of

LINES = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(3))


def write_zst(path: Path, data: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


def mixed_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()) + gzip.compress(b'{"text": "second part"}\n'))
    write_zst(folder / "c.ndjson.zst", LINES.encode())
    write_zst(folder / "d.txt.zst", b"a text")
    (folder / "e.json.gz").write_bytes(gzip.compress(b'[{"text": "in an array"}]'))
    (folder / ".hidden.pdf").write_bytes(b"%PDF")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no data")
    return folder


def test_compressed_files_of_a_folder_are_read_with_the_others(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "data")
    three = ["line 0", "line 1", "line 2"]
    assert texts_of(folder) == [*three, *three, "second part", *three, "a text", "in an array"]
    corpus = ingest(Root.open(tmp_path / "c", create=True), "docs", [folder], byte_tokenizer(), IngestPlan())
    names = ["a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.txt.zst", "e.json.gz"]
    assert [source.name for source in corpus.spec.sources] == names
    assert [source.sha256 for source in corpus.spec.sources] == [file_sha256(folder / name) for name in names]


def test_files_of_unknown_kinds_are_named_unless_they_are_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixed_folder(tmp_path / "data")
    for name in ("w.pdf", "x.csv", "y.parquet.gz", "z.docx"):
        (folder / name).write_bytes(b"?")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    command = ["ingest", folder, "--cache", tmp_path / "c", "--corpus", "docs", "--tokenizer", tmp_path]
    said = refused(capsys, *command)
    assert f"4 files of an unknown kind would be left out: {folder}/w.pdf, {folder}/x.csv, {folder}/y.parq" in said
    assert ", …; known are .txt, .md, " in said
    assert "--skip-unknown" in said
    assert not (tmp_path / "c").exists()
    assert run(*command, "--skip-unknown") == 0
    assert "of 5 files; 6 duplicate rows; 4 files of unknown kinds left out" in capsys.readouterr().out


def test_a_text_file_is_no_source_of_token_ids_or_messages(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "a.jsonl").write_text(LINES)
    for field in (Field("ids", "x"), Field("messages", "x")):
        with pytest.raises(InvalidInput, match=r"1 file of an unknown kind would be left out: .*README\.md"):
            list_sources([tmp_path], field)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        # Without a time in it, or every process of the suite would name the test otherwise.
        ("a.txt.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read as gzip: Truncated compressed"),
        ("a.jsonl.zst", b"no zstandard", "cannot be read as zstd: "),
        ("a.txt.gz", gzip.compress(b"ok \xff", mtime=0), "is not UTF-8: invalid start byte at byte 3"),
    ],
)
def test_a_compressed_file_that_is_damaged_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidInput, match=message) as caught:
        texts_of(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_given_by_name_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InvalidInput, match=r"convert it \(--skip-unknown holds for files in folders only\)"):
        list_sources([tmp_path / "a.csv"], Field(), skip_unknown=True)
