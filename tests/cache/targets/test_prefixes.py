"""Warnings of rows without the BOS that a teacher's tokenizer declares, and of rows with two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from potstill.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.teacher_tokenizer import TeacherTokenizer
from potstill.cache.targets.prefixes import prefix_warning
from tests.support.corpora import byte_tokenizer, teacher_for

BOS = 7


def corpus_of(root: Path, *rows: list[int], tokenizer: Tokenizer | None = None) -> Corpus:
    cache = Cache.open(root, mode="r+")
    ids = [np.array(row, np.uint32) for row in rows]
    return ingest_rows(cache.root, "docs", ids, tokenizer or byte_tokenizer(), IngestPlan())


def test_rows_without_the_declared_bos_are_told(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [1, 2, 3], [4, BOS])
    identity = teacher_for(corpus).identity
    declared = TeacherTokenizer(byte_tokenizer(), BOS)
    told = prefix_warning("big", corpus, identity, declared)
    assert told == (
        "big on docs: the model's tokenizer puts BOS, id 7, before every text, but no row begins with it; give the "
        "teacher the option prefix_ids=[7], or ingest with --prepend-bos"
    )
    assert prefix_warning("big", corpus, replace(identity, prefix_ids=(BOS,)), declared) == ""
    assert prefix_warning("big", corpus, identity, TeacherTokenizer(byte_tokenizer(), None)) == ""
    assert prefix_warning("big", corpus, identity) == ""


def test_a_document_that_begins_with_bos_is_enough(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [BOS, 2, 3], [4, 5])
    identity = teacher_for(corpus).identity
    assert prefix_warning("big", corpus, identity, TeacherTokenizer(byte_tokenizer(), BOS)) == ""
    told = prefix_warning("big", corpus, replace(identity, prefix_ids=(BOS,)))
    assert told == (
        "big on docs: 1 of the first 2 rows begin with [7] already, and the teacher's prefix_ids put it in front "
        "again; leave the option out"
    )


def test_the_corpus_tokenizer_stands_for_one_that_is_not_at_hand(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    corpus = corpus_of(tmp_path / "c", [1, 2, 3], tokenizer=tokenizer)
    assert "BOS, id 0," in prefix_warning("big", corpus, teacher_for(corpus).identity)
