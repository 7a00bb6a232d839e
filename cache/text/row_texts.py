"""The text of a corpus's rows, by document and across the cuts between rows, in windows of bounded size.

Shape legend:  T tokens, R rows of a window, W words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.text.words import normalised, word_hashes
from potstill.cache.types import Tokens

_WINDOW_TOKENS = 1 << 15
_OVERLAP_TOKENS = 1 << 11
_READ_ROWS = 1024
_DECODED_TOKENS = 1 << 18
_PAGE_DOCUMENTS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Rows of one document that follow each other."""

    document: int
    first_row: int
    rows: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return sum(map(len, self.rows))

    def ids(self, rows: int | None = None) -> list[int]:
        """Token ids of the rows, or of the first ones."""
        ids: list[int] = np.concatenate(self.rows[:rows]).tolist()
        return ids


def windows(corpus: Corpus) -> Iterator[Window]:
    """Cut the documents of a corpus into windows; in a long document each begins with the end of the one before."""
    for document, first, last in _documents(corpus):
        held: list[Tokens] = []
        begin = first  # row of the first that is held
        fresh = 0
        for start in range(first, last, _READ_ROWS):
            for row in corpus.rows(start, min(start + _READ_ROWS, last)):
                held.append(row)
                fresh += len(row)
                if fresh >= _WINDOW_TOKENS:
                    yield Window(document, begin, tuple(held))
                    kept = _overlap(held)
                    begin, held, fresh = begin + len(held) - len(kept), kept, 0
        if fresh:
            yield Window(document, begin, tuple(held))


def batches(found: Iterator[Window]) -> Iterator[list[Window]]:
    """Put windows together that are decoded in one call, which uses all cores."""
    batch: list[Window] = []
    size = 0
    for window in found:
        batch.append(window)
        size += window.num_tokens
        if size >= _DECODED_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def words_of(tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> list[NDArray[np.uint64]]:
    """Hash the words of token ids, each [W]; control tokens are none."""
    return [word_hashes(normalised(text)) for text in tokenizer.decode_batch(list(ids), skip_special_tokens=True)]


def text_of(tokenizer: Tokenizer, window: Window) -> str:
    """A window's text, as its words are compared."""
    return normalised(tokenizer.decode(window.ids(), skip_special_tokens=True))


def rows_of_words(tokenizer: Tokenizer, window: Window, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Tell which words [W] of a window's text each row has a part of: first and end, [R, 2] int64."""
    before = words_of(tokenizer, [window.ids(rows) for rows in range(1, len(window.rows))])
    spans = np.zeros((len(window.rows), 2), np.int64)
    spans[-1, 1] = len(words)
    for row, prefix in enumerate(before):
        begun = min(len(prefix), len(words))
        # A word that the cut parts is of both rows.
        parted = begun > 0 and prefix[begun - 1] != words[begun - 1]
        spans[row, 1], spans[row + 1, 0] = begun, begun - parted
    return spans


def _overlap(rows: list[Tokens]) -> list[Tokens]:
    size, count = 0, 0
    while size < _OVERLAP_TOKENS and count < len(rows):
        count += 1
        size += len(rows[-count])
    return rows[-count:]


def _documents(corpus: Corpus) -> Iterator[tuple[int, int, int]]:
    """Number, first row and end of each document."""
    count = corpus.num_documents
    for start in range(0, count, _PAGE_DOCUMENTS):
        stop = min(start + _PAGE_DOCUMENTS, count)
        says = corpus.spec.num_documents is not None
        rows = corpus.document_starts(start, stop + 1) if says else corpus.document_rows[start : stop + 1]
        for document, (first, last) in enumerate(zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True), start):
            yield document, first, last
