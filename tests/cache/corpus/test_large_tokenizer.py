"""A corpus's tokenizer that has more bytes than any has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from potstill.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.tokenizer import MAX_TOKENIZER_BYTES
from potstill.cache.errors import CorruptSegment, InvalidInput
from potstill.cache.store import GroupReader, GroupWriter
from potstill.cache.store.new_arrays import Layout
from tests.support.corpora import make_corpus

ROW = np.arange(9, dtype=np.uint32)


def test_a_tokenizer_that_no_corpus_keeps_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = {"a" * (MAX_TOKENIZER_BYTES // 8) + str(index): index for index in range(8)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=""))
    root = Cache.open(tmp_path / "c", mode="r+").root
    with pytest.raises(InvalidInput, match=f"keeps at most {MAX_TOKENIZER_BYTES}"):
        ingest_rows(root, "docs", [ROW], tokenizer, IngestPlan(row_tokens=16))
    assert not root.objects("corpora")


def test_a_sealed_one_of_a_few_kilobytes_that_unpack_to_more_is_not_read(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    writer = GroupWriter(cache.root, "corpora/docs/planted")
    writer.write("tokenizer_json", np.zeros(MAX_TOKENIZER_BYTES + 1, np.uint8), Layout((1 << 20,)))
    planted = GroupReader(cache.root, "corpora/docs/planted", writer.finish())
    with pytest.raises(CorruptSegment, match=f"at most {MAX_TOKENIZER_BYTES}"):
        _ = Corpus(cache.root, "docs", corpus.spec, planted).tokenizer
