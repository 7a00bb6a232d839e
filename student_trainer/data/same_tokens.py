"""Check that the ids in a corpus's rows are the same tokens to a student that another tokenizer's rows taught."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.tokenizer import token_table
from potstill.cache.errors import SpecMismatch

_BLOCK = 1 << 22
"""Positions that are looked at together."""


def require_same_tokens(corpus: Corpus, tokenizer: Tokenizer, of: str) -> None:
    """Check that each id in a corpus's rows is the same token to another tokenizer; others may differ.

    Args:
        corpus: with its own tokenizer.
        tokenizer: the student's.
        of: names in a message what has it.

    Raises:
        SpecMismatch: an id is another token.
    """
    ours, theirs = token_table(corpus.tokenizer), token_table(tokenizer)
    differing = [token for token in ours if ours[token] != theirs.get(token)]
    for start in range(0, corpus.num_positions if differing else 0, _BLOCK):
        tokens = corpus.tokens(start, min(start + _BLOCK, corpus.num_positions))
        found = tokens[np.isin(tokens, differing)]
        if len(found):
            token = int(found[0])
            shown = [
                repr(each[token][0].decode(errors="replace")) if token in each else "nothing" for each in (ours, theirs)
            ]
            raise SpecMismatch(
                f"corpus {corpus.name!r} has another tokenizer than {of}: id {token} is {shown[0]} in its rows, and "
                f"{shown[1]} to {of}; ingest the text again with the tokenizer of {of}"
            )


def require_tokens_of(corpus: Corpus, own: Corpus) -> None:
    """Check that a further corpus has the tokens of a run's own; raises as `require_same_tokens`."""
    if corpus.tokenizer_sha256 != own.tokenizer_sha256:
        require_same_tokens(corpus, own.tokenizer, f"the run's corpus {own.name!r}")
