"""A megabyte of mixed text, told byte by byte by three families of tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.projection.axis import TextAxis
from potstill.cache.projection.spelling import Spelling
from tests.support.tokenizers.mistral import sentencepiece, tekken
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import ingested, mixed_texts, write


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    """English, code, Chinese, Japanese, emoji, digits and spaces."""
    texts = mixed_texts(1_000_000)
    source = write(tmp_path / "text", texts)
    cache = Cache.open(tmp_path / "cache", mode="r+")
    families = {"bytes": trained(texts[:60], 8192), "pieces": sentencepiece(), "tekken": tekken()}
    axes = []
    for name, tokenizer in families.items():
        corpus = ingested(cache, name, source, tokenizer, row_tokens=512)
        axes.append(TextAxis(corpus, Spelling(corpus)))
        for document, text in enumerate(texts):
            assert axes[-1].text(document) == text.encode(), (name, document)
    for axis in axes[1:]:
        axis.require_same_documents(axes[0])
