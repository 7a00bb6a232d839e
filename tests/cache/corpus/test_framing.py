"""BOS and EOS around documents, and the warning of rows without the BOS that a tokenizer declares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from potstill.cache import Cache
from tests.support.command_line import refused, run
from tests.support.corpora import byte_tokenizer

BOS, EOS = 256, 257


def write_tokenizer(folder: Path, *, post_processor: bool = False, **config: Any) -> Path:
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def rows_after(tmp_path: Path, source: Path, *options: object, tokenizer: Path | None = None) -> list[list[int]]:
    tokenizer = tokenizer or write_tokenizer(tmp_path / "t")
    root = tmp_path / "c"
    where = ["--cache", root, "--corpus", "docs", "--tokenizer", tokenizer]
    assert run("ingest", source, *where, *options) == 0
    corpus = Cache.open(root).corpus("docs")
    return [row.tolist() for row in corpus.rows(0, len(corpus))]


def test_documents_are_framed_before_they_are_cut(tmp_path: Path) -> None:
    texts = ["x" * 9, "", "y" * 3]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = rows_after(tmp_path, tmp_path / "a.jsonl", "--append-eos", "--prepend-bos", "--row-tokens", 5)
    x, y = (byte_tokenizer().token_to_id(letter) for letter in "xy")
    assert rows == [[BOS, x, x, x, x], [x, x, x, x, x], [EOS], [BOS, y, y, y, EOS]]


def test_ids_that_are_framed_already_stay_so_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"input_ids": [[BOS, 1, EOS], [2], [BOS], []]}), tmp_path / "a.parquet")
    options = ("--ids-field", "input_ids", "--append-eos", "--prepend-bos")
    assert rows_after(tmp_path, tmp_path / "a.parquet", *options) == [[BOS, 1, EOS], [BOS, 2, EOS], [BOS, EOS]]
    said = capsys.readouterr().out
    assert "; 2 documents began with BOS already; 1 document ended with EOS already\n" in said
    assert f"from 3 documents of 1 file; 0 duplicate rows; 1 empty document left out (first: {tmp_path}/a.par" in said
    command = ("ingest", tmp_path / "a.parquet", "--ids-field", "input_ids", "--tokenizer", tmp_path / "t")
    assert run(*command, "--cache", tmp_path / "c", "--corpus", "plain") == 0
    assert "already" not in capsys.readouterr().out
    assert Cache.open(tmp_path / "c").corpus("plain").num_documents == 3


def test_empty_texts_are_counted_and_are_no_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n' + '{"text": "more"}\n' * 300)
    (tmp_path / "d" / "b.txt").write_text("")
    rows_after(tmp_path, tmp_path / "d")
    said = capsys.readouterr().out
    assert (
        f"from 301 documents of 2 files; 299 duplicate rows; 2 empty documents left out (first: {tmp_path}/d/" in said
    )
    assert "a.jsonl:2)" in said
    corpus = Cache.open(tmp_path / "c").corpus("docs")
    assert [each.documents for each in corpus.spec.sources] == [301, 0]
    assert corpus.num_documents == 301


def test_raw_tokens_end_documents_at_the_tokenizers_eos(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"".join(n.to_bytes(2, "little") for n in (1, 2, EOS, 3, EOS)))
    rows = rows_after(tmp_path, tmp_path / "a.bin", "--append-eos")
    assert rows == [[1, 2, EOS], [3, EOS]]
    assert Cache.open(tmp_path / "c").corpus("docs").spec.sources[0].documents == 2


def test_a_tokenizer_that_names_no_such_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "t").mkdir()
    byte_tokenizer().save(str(tmp_path / "t" / "tokenizer.json"))
    command = ["ingest", tmp_path / "a.txt", "--cache", tmp_path / "c", "--corpus", "d", "--tokenizer", tmp_path / "t"]
    for option, name in (("--append-eos", "eos_token"), ("--prepend-bos", "bos_token")):
        said = refused(capsys, *command, option)
        assert f"{option} needs a {name}, and no file beside the tokenizer names one; add it to tokenizer_c" in said
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("made", [{"add_bos_token": True}, {"post_processor": True}])
def test_rows_without_the_bos_that_the_tokenizer_declares_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Any
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", **made)
    warning = f"warning: this tokenizer begins every text with '<s>', .* --option prefix_ids=[{BOS}]"
    begin, end = warning.split(" .* ")
    sources = {"--text-field": tmp_path / "a.jsonl", "--ids-field": tmp_path / "b.jsonl"}
    sources["--text-field"].write_text('{"x": "text"}\n')
    sources["--ids-field"].write_text('{"x": [1, 2]}\n')
    for number, (option, source) in enumerate(sources.items()):
        command = ["ingest", source, option, "x", "--cache", tmp_path / "c", "--tokenizer", tokenizer, "--corpus"]
        assert run(*command, f"without-{number}") == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(said) == 1
        assert said[0].startswith(begin)
        assert said[0].endswith(end)
        assert run(*command, f"with-{number}", "--prepend-bos") == 0
        assert "warning" not in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text(f'{{"x": [{BOS}, 2]}}\n')
    command = ["ingest", tmp_path / "b.jsonl", "--ids-field", "x", "--cache", tmp_path / "c", "--tokenizer", tokenizer]
    assert run(*command, "--corpus", "framed") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_tokenizer_that_only_names_a_bos_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    rows_after(tmp_path, tmp_path / "a.txt", tokenizer=write_tokenizer(tmp_path / "t", add_bos_token=False))
    assert "warning" not in capsys.readouterr().err
