"""From documents to token ids: text through the tokenizer, ids as they are.

Shape legend:  T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus.control_tokens import ControlTokens, Disguised
from potstill.cache.corpus.plan import Found, IngestPlan
from potstill.cache.corpus.sources import BadRecords, Document, Ids, SourceFile, Text, documents
from potstill.cache.corpus.tokenization import encode_documents
from potstill.cache.corpus.tokenizer import num_ids
from potstill.cache.errors import InvalidInput
from potstill.cache.types import Tokens


class DocumentTokens:
    """Makes token ids of files' documents as a plan says, and counts in `found` what it comes across."""

    def __init__(self, tokenizer: Tokenizer, plan: IngestPlan, found: Found) -> None:
        self._plan = plan
        self._found = found
        self._vocab_size = num_ids(tokenizer)
        self._control = ControlTokens(tokenizer)
        keep = plan.special_tokens == "keep"
        self._of_text = tokenizer if keep else Disguised(tokenizer, self._control).tokenizer

    def of_file(self, file: SourceFile) -> Iterator[Iterable[Tokens]]:
        """Yield each document of a file as blocks of token ids [T], to be read before the next is asked for.

        Raises:
            InvalidInput: the file or a record is bad, has an id that the tokenizer does not have, or a control token
                that is refused.
        """
        bad = BadRecords(skip=self._plan.skip_bad)
        found = documents(file, self._plan.field, bad, vocab_size=self._vocab_size)
        if self._plan.field.kind == "text" and file.kind != "tokens":
            texts = (self._watched(document) for document in found)
            yield from encode_documents(self._of_text, texts, str(file.path))
        else:
            yield from (self._checked(document) for document in found)
        self._found.bad_records += bad.count
        self._found.first_bad = self._found.first_bad or bad.first

    def _watched(self, document: Document) -> Iterator[str]:
        assert isinstance(document, Text)

        def see(name: str, at: int) -> None:
            if self._plan.special_tokens == "refuse":
                raise InvalidInput(
                    f"{document.where} has the control token {name!r} at character {at}; take it out, or take it as "
                    "text with --special-tokens split"
                )
            self._found.control_tokens[name] += 1

        return self._control.seen(document.pieces, see)

    def _checked(self, document: Document) -> Iterator[Tokens]:
        assert isinstance(document, Ids)
        for block in document.blocks:
            if len(block) and (block.max() >= self._vocab_size or block.min() < 0):
                raise _unknown_id(document.where, block, self._vocab_size)
            yield block.astype(np.uint32, copy=False)


def _unknown_id(where: str, block: NDArray[Any], vocab_size: int) -> InvalidInput:
    wrong = block[(block >= vocab_size) | (block < 0)][0]
    return InvalidInput(
        f"{where} has the token id {wrong}, the tokenizer's ids end at {vocab_size - 1}; "
        "give the tokenizer that made it"
    )
