"""Corpora and tokenizers between which nothing can be projected: each is one line that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from potstill.cache import Cache
from potstill.cache.corpus import IngestPlan
from potstill.cache.corpus.ingest import ingest_rows
from potstill.cache.errors import InvalidInput, SpecMismatch, UnknownTeacher, UnsupportedField
from potstill.cache.projection import ProjectionPlan, project
from tests.support.corpora import byte_tokenizer, topics
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import ingested, projected, taught, write

TEXTS = topics(3, characters=300)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """With the teacher's corpus and targets."""
    cache = Cache.open(tmp_path / "cache", mode="r+")
    taught(cache, ingested(cache, "teachers", write(tmp_path / "text", TEXTS), byte_tokenizer()), k=4)
    return cache


def lower_casing() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def nfkc() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def without_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    latin = [chr(each) for each in (*range(9, 11), *range(32, 256), 0xFB01, 0x2460, 0xFF21)]
    tokenizer.train_from_iterator([*TEXTS, " ".join(latin), "".join(latin)], trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lower_casing, r"changes letters, as to lower case: it makes b'ab ab"),
        (nfkc, r"normalises characters, as NFKC does: it makes b'fi 1"),
        (without_fallback, r"no byte fallback"),
        (word_pieces, r"changes spaces"),
    ],
)
def test_tokenizers_that_do_not_keep_every_byte(
    cache: Cache, tmp_path: Path, make: Callable[[], Tokenizer], told: str
) -> None:
    """Named with what they do to which text, and with the kinds that are fit."""
    ingested(cache, "students", tmp_path / "text", make())
    with pytest.raises(UnsupportedField, match=f"the tokenizer of corpus 'students' .*{told}") as raised:
        projected(cache)
    assert "\n" not in raised.value.detail
    assert "SentencePiece with byte fallback" in raised.value.detail


def test_a_text_that_a_tokenizer_composes_is_another_text(cache: Cache, tmp_path: Path) -> None:
    """NFC is let pass where it changes nothing; a document that it changed is not the same."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    ingested(cache, "students", tmp_path / "text", tokenizer)
    assert projected(cache)[1].tally.resolved == 1
    source = write(tmp_path / "decomposed", [TEXTS[0], "a\u030angstrom"])
    taught(cache, ingested(cache, "theirs", source, byte_tokenizer()), k=4)
    ingested(cache, "mine", source, tokenizer)
    with pytest.raises(
        SpecMismatch, match=r"document 2 of 2, of 000001.txt, differs at byte 0: b'\\xc3\\xa5ngs.* in corpus 'mine'"
    ):
        projected(cache, "mine", "theirs")


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (TEXTS[:2], "corpus 'students' has 2 documents, corpus 'teachers' has 3; ingest the same sources"),
        (
            [*TEXTS[:2], TEXTS[2][:-5] + "12345"],
            r"document 3 of 3, of 000002.txt, differs at byte 295: b'.*' in corpus 'students', b'",
        ),
        ([TEXTS[1], TEXTS[0], TEXTS[2]], "document 1 of 3, of 000000.txt, differs at byte"),
        ([*TEXTS[:2], TEXTS[2] + "!"], "document 3 of 3, of 000002.txt, differs at byte 300"),
    ],
)
def test_other_documents(cache: Cache, tmp_path: Path, texts: list[str], told: str) -> None:
    """The first place where the texts differ is named."""
    ingested(cache, "students", write(tmp_path / "others", texts), trained(TEXTS, 300))
    with pytest.raises(SpecMismatch, match=told):
        projected(cache)


def test_corpora_that_do_not_know_their_documents(cache: Cache) -> None:
    """Rows without documents cannot be laid beside others."""
    ingest_rows(cache.root, "students", [np.arange(9, dtype=np.uint32)], byte_tokenizer(), IngestPlan(row_tokens=9))
    with pytest.raises(UnsupportedField, match="'students' does not say which row is of which document; ingest"):
        projected(cache)


def test_wishes_that_mean_nothing(cache: Cache, tmp_path: Path) -> None:
    """One corpus for both, targets without a top-k, targets that are projected, and none at all."""
    ingested(cache, "students", tmp_path / "text", trained(TEXTS, 300))
    with pytest.raises(InvalidInput, match="corpus 'teachers' is both; name the corpus"):
        projected(cache, "teachers", "teachers")
    projected(cache)
    ingested(cache, "more", tmp_path / "text", trained(TEXTS, 310))
    with pytest.raises(UnsupportedField, match="for corpus 'students' are projected themselves; name the corpus of"):
        projected(cache, "more", "students")
    with pytest.raises(UnknownTeacher, match="teacher 'other' has no targets for corpus 'teachers'"):
        project(cache, ProjectionPlan(corpus="students", teacher="other", source="teachers"))
