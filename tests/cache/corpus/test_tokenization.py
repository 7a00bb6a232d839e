"""Long texts in windows, against the tokenizer's own answer to the whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from potstill.cache.corpus.sources import SourceFile
from potstill.cache.corpus.sources.documents import BadRecord
from potstill.cache.corpus.sources.written import text_pieces
from potstill.cache.corpus.tokenization import encode_documents, windows
from tests.support.corpora import topics

WINDOW, OVERLAP = 3000, 1500
TEXT = "\n".join(topics(40, characters=4000))
OTHERS = "漢字かな交じり文とé\u0301🙂🏽 \r\n\t  12345678 \u00a0ﬁ" * 40

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
bpe_trainer = partial(trainers.BpeTrainer, vocab_size=600, show_progress=False)
MIXED = [TEXT, OTHERS, " " * 99, "x" * 99, "\r\n" * 50]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(
        tokenizer,
        bpe_trainer(initial_alphabet=ALPHABET),
    )


def like_llama_3() -> Tokenizer:
    """Digits by threes, and a look-ahead at the end of white space."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return trained(
        tokenizer,
        bpe_trainer(initial_alphabet=ALPHABET),
    )


def like_llama_2() -> Tokenizer:
    """The whole text is one word, with a mark at its beginning."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    trained(tokenizer, bpe_trainer(special_tokens=["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return trained(tokenizer, trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], vocab_size=600))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT[:40_000], OTHERS], trainer)
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, like_llama_3, like_llama_2, unigram)}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def in_windows(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    pieces = [[text[at : at + 777] for at in range(0, len(text), 777)] for text in texts]
    found = encode_documents(tokenizer, pieces, "a text", window=WINDOW, overlap=OVERLAP)
    return [[token for block in blocks for token in block.tolist()] for blocks in found]


@each_tokenizer
def test_a_long_text_has_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    texts = [TEXT[:30_000], "short", "", OTHERS + TEXT[:9000] + OTHERS, "also short"]
    assert in_windows(tokenizer, *texts) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@each_tokenizer
@pytest.mark.parametrize("text", [" ", "a", "ab ", "\n", "=-", "7", "🙂", "é\u0301"])
def test_a_mile_of_the_same_has_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    mile = "It begins. " + text * (10_001 // len(text)) + " It ends."
    assert in_windows(tokenizer, mile) == [tokenizer.encode(mile, add_special_tokens=False).ids]


@each_tokenizer
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([TEXT, OTHERS, " " * 99, "x" * 99, "\r\n" * 50]), st.integers(1, 3000)), min_size=3
    )
)
def test_any_mix_has_the_tokens_of_the_whole(tokenizer: Tokenizer, parts: list[tuple[str, int]]) -> None:
    text = "".join((part * 60)[:count] for part, count in parts)
    assert in_windows(tokenizer, text) == [tokenizer.encode(text, add_special_tokens=False).ids]


def test_a_text_file_is_read_in_pieces_that_part_no_character(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\ufeff" + "a€" * 300_000, encoding="utf-8")
    lengths = [len(piece) for piece in text_pieces(SourceFile(path, path.name, "text"))]
    assert sum(lengths) == 600_000
    assert max(lengths) < 300_000
    path.write_bytes(b"\xc3\xa9" * 200_000 + b"\xc3")
    with pytest.raises(BadRecord, match=r"is not UTF-8: unexpected end of data at byte 400000$"):
        list(text_pieces(SourceFile(path, path.name, "text")))


def test_windows_overlap_and_cover_the_text() -> None:
    text = "".join(map(chr, np.arange(65, 165)))
    cut = list(windows([text[:3], text[3:50], "", text[50:]], 20, 5))
    assert cut[0] + "".join(part[5:] for part in cut[1:]) == text
    assert list(windows([], 20, 5)) == [""]
    assert list(windows(["x" * 20], 20, 5)) == ["x" * 20]
