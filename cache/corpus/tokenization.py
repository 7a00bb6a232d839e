"""From the texts of documents to token ids: short texts many in one call, long ones in overlapping windows.

A tokenizer needs over a hundred times the memory of its text, so that a text of any length is not given to it at once.
Where two windows overlap, their tokens differ at the ends that were cut, and soon agree in between, as what a token is
depends on the text near it. They are joined in the middle of a long run of tokens that both have at the same places,
which gives the tokens of the whole. Where there is no such run, as in a mile of one letter, the two are tokenized as
one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Tokens

WINDOW = 1 << 18
"""Characters that are tokenized at a time."""
OVERLAP = 1 << 13
"""Characters that two neighbouring windows share."""
_TOGETHER = 4  # windows in one call of the tokenizer, which uses a core for each
_AGREEING = 64  # tokens: far more than a word has, at whose ends a tokenizer begins anew
# Documents in one call of the tokenizer, which uses all cores; a call for each would use one.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = _TOGETHER * WINDOW


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[Iterable[str]], where: str, *, window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[Iterable[Tokens]]:
    """Tokenize documents, each given as the pieces of its text; yields the token ids of each, in blocks.

    The blocks of one document are read before the next is asked for. `where` names the documents in errors.

    Raises:
        InvalidInput: the tokenizer cannot read a document.
    """
    batch: list[str] = []
    characters = 0
    for pieces in texts:
        parts = windows(pieces, window, overlap)
        text, second = next(parts), next(parts, None)
        if second is None:
            batch.append(text)
            characters += len(text)
        if second is not None or len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from _encode_short(tokenizer, batch, where)
            batch, characters = [], 0
        if second is not None:
            yield _encode_windows(tokenizer, chain((text, second), parts), where, overlap)
    yield from _encode_short(tokenizer, batch, where)


def windows(pieces: Iterable[str], window: int, overlap: int) -> Iterator[str]:
    """Cut a text that comes in pieces into windows; each begins with the last `overlap` characters of the one before.

    An empty text is one empty window.
    """
    text = ""
    for piece in pieces:
        at = 0
        while len(text) + len(piece) - at > window:
            more = window - len(text)
            whole = text + piece[at : at + more]
            yield whole
            at += more
            text = whole[window - overlap :]
        text += piece[at:]
    yield text


def _encode_short(tokenizer: Tokenizer, texts: list[str], where: str) -> Iterator[Iterable[Tokens]]:
    for encoded in _encodings(tokenizer.encode_batch_fast, texts, where):
        yield (np.array(encoded.ids, dtype=np.uint32),)


def _encode_windows(tokenizer: Tokenizer, texts: Iterator[str], where: str, overlap: int) -> Iterator[Tokens]:
    held: _Window | None = None
    while some := list(islice(texts, _TOGETHER)):
        for fresh in _tokenized(tokenizer, some, where):
            if held is None:
                held = fresh
                continue
            join = held.joined_at(fresh, overlap)
            if join is None:
                (both,) = _tokenized(tokenizer, [held.text + fresh.text[overlap:]], where)
                held = replace(both, begin=both.find(held, where))
            else:
                ours, theirs = join
                yield held.ids[held.begin : ours]
                held = replace(fresh, begin=theirs)
    if held is not None:
        yield held.ids[held.begin :]


@dataclass(frozen=True, slots=True)
class _Window:
    """A window's text and tokens."""

    text: str
    ids: Tokens
    places: list[tuple[int, int]]
    """First character and id of each token."""
    begin: int = 0
    """Number of tokens that are taken from the window before."""

    def joined_at(self, after: _Window, overlap: int) -> tuple[int, int] | None:
        """Index in this window and in the next one of a token from which on the next one's are taken, or None."""
        shift = len(self.text) - overlap
        first = max(self.begin, bisect_left(self.places, (shift, 0)))
        theirs = {place: index for index, place in enumerate(after.places)}
        run, before = 0, -1
        for index in range(first, len(self.places)):
            start, token = self.places[index]
            found = theirs.get((start - shift, token), -1)
            run = run + 1 if run and found == before + 1 else int(found >= 0)
            before = found
            if run == 2 * _AGREEING:
                return index - _AGREEING, found - _AGREEING
        return None

    def find(self, shorter: _Window, where: str) -> int:
        """Index of the token that a window with the same first character begins with."""
        try:
            return self.places.index(shorter.places[shorter.begin]) if shorter.begin else 0
        except ValueError:
            raise InvalidInput(f"{where}: its tokens depend on text far away; part the document") from None


def _tokenized(tokenizer: Tokenizer, texts: list[str], where: str) -> Iterator[_Window]:
    for text, encoded in zip(texts, encoded_texts(tokenizer, texts, where), strict=True):
        places = [(start, token) for (start, _), token in zip(encoded.offsets, encoded.ids, strict=True)]
        yield _Window(text, np.array(encoded.ids, dtype=np.uint32), places)


def encoded_texts(tokenizer: Tokenizer, texts: list[str], where: str) -> list[Any]:
    """Tokenize whole texts in one call; the `tokenizers.Encoding` of each, with places in characters.

    Raises:
        InvalidInput: the tokenizer cannot read one.
    """
    return _encodings(tokenizer.encode_batch, texts, where)


def _encodings(encode: Any, texts: list[str], where: str) -> list[Any]:
    try:
        return list(encode(texts, add_special_tokens=False))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InvalidInput(f"the tokenizer cannot read a document of {where}: {error}") from error
