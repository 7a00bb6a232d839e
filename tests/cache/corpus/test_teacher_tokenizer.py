"""The BOS that a model's tokenizer declares, in either of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from potstill.cache.corpus.teacher_tokenizer import TeacherTokenizer
from potstill.cache.errors import InvalidInput
from tests.support.corpora import VOCAB, byte_tokenizer

BOS = VOCAB


def with_bos(template: str = "") -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    if template:
        specials = [("<bos>", BOS), ("<eos>", BOS + 1)]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "config", "bos"),
    [
        ("", {}, None),
        ("<bos> $A", {}, BOS),
        ("<bos> $A <eos>", {}, BOS),
        ("$A <eos>", {}, None),
        ("", {"add_bos_token": True, "bos_token": "<bos>"}, BOS),
        ("", {"add_bos_token": True, "bos_token": {"content": "<bos>", "special": True}}, BOS),
        ("", {"bos_token": "<bos>"}, None),
        ("", {"add_bos_token": True}, None),
        ("<bos> $A", {"add_bos_token": True}, BOS),
        ("<bos> $A", {"add_bos_token": False, "bos_token": "<bos>"}, None),
    ],
)
def test_bos_is_what_the_files_declare(tmp_path: Path, template: str, config: dict[str, Any], bos: int | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TeacherTokenizer.of(with_bos(template), tmp_path).bos_id == bos


def test_without_a_configuration_the_tokenizer_tells(tmp_path: Path) -> None:
    assert TeacherTokenizer.of(with_bos("<bos> $A"), tmp_path).bos_id == BOS
    assert TeacherTokenizer.of(with_bos("<bos> $A")).bos_id == BOS


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"tokenizer_config\.json is not (JSON|a JSON object)"):
        TeacherTokenizer.of(with_bos(), tmp_path)
