"""Facts about the tokens that a student is to predict: their bytes in the text, and their kind.

Bytes make losses of different tokenizers comparable: all of them encode the same bytes. They are known where a
tokenizer keeps every byte of a text in some token, as byte-level ones and those of SentencePiece with byte fallback
do; one that drops the spaces between words (WordPiece, plain words) has no bits per byte. Special tokens have no bytes.

Shape legend:  V ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.tokenizer import num_ids, token_table
from potstill.cache.projection.categories import CATEGORIES, SPECIAL, category_of

NO_CATEGORY = len(CATEGORIES)
"""Category of a position without a label."""

_KEEPS_SPACES = {"ByteLevel", "ByteFallback", "Metaspace", "Fuse", "Replace", "Strip"}
"""Decoders that put nothing between tokens which is in none of them."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelTable:
    """Facts about each id of a tokenizer."""

    num_bytes: NDArray[np.int64] | None
    """[V] bytes of the text that it stands for; None where the tokenizer does not tell."""
    category: NDArray[np.int64]
    """[V] index into `CATEGORIES`."""
    problem: str = ""
    """In words, why there are no bytes."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> LabelTable:
        """Look at every id of a tokenizer; ids that it does not have are special, without bytes."""
        num_bytes = np.zeros(num_ids(tokenizer), dtype=np.int64)
        category = np.full(len(num_bytes), SPECIAL, dtype=np.int64)
        for token, (data, special) in token_table(tokenizer).items():
            if not special:
                num_bytes[token] = len(data)
                category[token] = category_of(data)
        problem = _dropped(tokenizer)
        return cls(None if problem else num_bytes, category, problem)


def _dropped(tokenizer: Tokenizer) -> str:
    """Say why the bytes of tokens are not those of the text; empty where they are."""
    parts = json.loads(tokenizer.to_str())
    decoder, cutter = parts["decoder"], parts["pre_tokenizer"]
    if "ByteLevel" in json.dumps([decoder, cutter]):
        return ""
    if decoder is None:
        return "the tokenizer joins its tokens by spaces that none of them has" if cutter is not None else ""
    kinds = {each["type"] for each in decoder.get("decoders", [decoder])}
    others = ", ".join(sorted(kinds - _KEEPS_SPACES))
    return f"the tokenizer's decoder {others} adds spaces that no token has" if others else ""
