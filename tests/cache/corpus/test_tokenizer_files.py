"""The files beside a tokenizer: read, checked, sealed in a corpus and read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.tokenizer_files import (
    MAX_FILE_BYTES,
    SpecialTokens,
    load_tokenizer_files,
    parse_tokenizer_files,
)
from potstill.cache.errors import FormatError, InvalidInput
from potstill.cache.store.root import Root
from tests.support.command_line import run
from tests.support.corpora import byte_tokenizer, write_texts
from tests.support.paths import GOLDEN

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def with_ends() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tokenizer as `transformers` saves it."""
    folder = tmp_path / "tokenizer"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=with_ends(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder


def made(root: Path, files: dict[str, str]) -> Any:
    rows = [np.arange(3, dtype=np.uint32)]
    return ingest_rows(Root.open(root, create=True), "docs", rows, with_ends(), IngestPlan(), tokenizer_files=files)


def test_what_transformers_saved_is_sealed_by_ingest(saved: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", ["some text"])
    assert run("ingest", source, "--cache", tmp_path / "c", "--corpus", "docs", "--tokenizer", saved) == 0
    corpus = Cache.open(tmp_path / "c").corpus("docs")
    assert corpus.tokenizer_files == load_tokenizer_files(saved) == load_tokenizer_files(saved / "tokenizer.json")
    assert corpus.tokenizer_files["tokenizer_config.json"] == (saved / "tokenizer_config.json").read_text()
    assert corpus.special_tokens == SpecialTokens(bos=256, eos=257, pad=258, chat_template=TEMPLATE)


def test_a_stranger_reads_the_files_with_zarr_alone(saved: Path, tmp_path: Path) -> None:
    files = load_tokenizer_files(saved)
    corpus = made(tmp_path / "c", files)
    array = zarr.open(tmp_path / "c" / "corpora" / "docs" / corpus.spec.data / "tokenizer_files", mode="r")
    assert isinstance(array, zarr.Array)
    assert json.loads(np.asarray(array[:]).tobytes()) == files


def test_a_corpus_without_files_names_no_token(tmp_path: Path) -> None:
    for corpus in (made(tmp_path / "c", {}), Cache.open(GOLDEN / "format-2").corpus("docs")):
        assert corpus.tokenizer_files == {}
        assert corpus.special_tokens == SpecialTokens()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": None}}, SpecialTokens(bos=256)),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}}}, SpecialTokens(eos=257)),
        ({"special_tokens_map.json": {"pad_token": {"content": "<pad>"}}}, SpecialTokens(pad=258)),
        (
            {"tokenizer_config.json": {"bos_token": "</s>"}, "special_tokens_map.json": {"bos_token": "<s>"}},
            SpecialTokens(bos=257),
        ),
        ({"tokenizer_config.json": {"chat_template": "a"}}, SpecialTokens(chat_template="a")),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "a"}]}},
            SpecialTokens(),
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
                }
            },
            SpecialTokens(chat_template="b"),
        ),
        ({"chat_template.json": {"chat_template": "c"}}, SpecialTokens(chat_template="c")),
    ],
)
def test_tokens_and_templates_are_found_in_each_form(files: dict[str, Any], expected: SpecialTokens) -> None:
    texts = {name: json.dumps(value) for name, value in files.items()}
    assert SpecialTokens.of(texts, with_ends()) == expected
    own = SpecialTokens.of({**texts, "chat_template.jinja": "own"}, with_ends())
    assert own.chat_template == "own"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            b'{"eos_token": "<end>"}',
            "names '<end>' as eos_token, and the tokenizer has no such",
        ),
        ("tokenizer_config.json", b'{"eos_token": 5}', "names 5 as eos_token"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, r"tokenizer_config\.json is not JSON"),
        ("special_tokens_map.json", b"[]", r"special_tokens_map\.json is not a JSON object"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: is not UTF-8: invalid start byte at byte 0"),
        ("chat_template.jinja", b" " * (MAX_FILE_BYTES + 1), r"has 4194305 bytes; a corpus keeps at most 4194304"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "has a chat_template that is no text: 5"),
    ],
)
def test_a_bad_file_is_one_line_before_anything_is_made(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        made(tmp_path / "c", load_tokenizer_files(tmp_path / "tokenizer"))
    assert list((tmp_path / "c").rglob("*")) == []


def test_sealed_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for data in (b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000):
        with pytest.raises(FormatError, match="here is no"):
            parse_tokenizer_files(data, "here")


def test_a_corpus_names_no_path_to_write_to(tmp_path: Path) -> None:
    """A student's folder gets these files, and the corpus may be a stranger's."""
    for number, name in enumerate(("../escaped", str(tmp_path / "escaped"), "config.json")):
        corpus = made(tmp_path / str(number), {name: "{}"})
        with pytest.raises(FormatError, match="has a file '.*, which is none of tokenizer_config"):
            _ = corpus.tokenizer_files
