"""Places of tokens in the text of their documents, which is the same for every tokenizer.

All documents of a corpus lie on one axis, one byte to a unit. In front of each is a unit for the token that begins
documents, and behind it one for the token that ends them, whether there is such a token or not. A token *ends* at the
unit that comes after it, and two corpora of the same documents have one axis.

Shape legend:  P positions, D documents, U bytes.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.errors import SpecMismatch
from potstill.cache.plurals import counted
from potstill.cache.projection.spelling import NONE, Spelling

BLOCK = 1 << 16
"""Positions that are looked at together."""
_BETWEEN = 2
_SHOWN = 24
_COMPARED = 1 << 20


class TextAxis:
    """A corpus on its axis. Takes 8 bytes a row and 24 a document of memory, and one pass over the tokens."""

    def __init__(self, corpus: Corpus, spelling: Spelling) -> None:
        self.corpus = corpus
        self.spelling = spelling
        self._lengths = spelling.lengths()
        self._flat = np.frombuffer(b"".join(spelling.bytes_of), dtype=np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        self.document_starts: NDArray[np.int64] = corpus.row_starts[corpus.document_rows]
        """Positions [D + 1]."""
        self.hashes: list[bytes] = []
        """Of each document's text."""
        self._marks = np.zeros(-(-corpus.num_positions // BLOCK) + 1, dtype=np.int64)
        """Unit before each block of positions, and behind the last."""
        self._survey()

    def place(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read tokens [stop - start] int64, and the units at which they end."""
        block = start // BLOCK
        begin = block * BLOCK
        tokens, widths, behind = self._widths(begin, stop)
        ends = self._marks[block] + np.cumsum(widths) + behind
        return tokens[start - begin :], ends[start - begin :]

    def first_ending_at(self, unit: int) -> int:
        """Find the first position whose token ends at a unit or behind it; P where none does."""
        block = max(int(np.searchsorted(self._marks, unit)) - 1, 0)
        # A token that ends a document ends one unit behind what its block has counted.
        for begin in range(max(block - 1, 0) * BLOCK, self.corpus.num_positions, BLOCK):
            _, ends = self.place(begin, min(begin + BLOCK, self.corpus.num_positions))
            if ends[-1] >= unit:
                return begin + int(np.searchsorted(ends, unit))
        return self.corpus.num_positions

    def documents_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """Number the documents [stop - start] of positions."""
        return np.searchsorted(self.document_starts, np.arange(start, stop), side="right") - 1

    def begins_documents(self, start: int, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of the tokens from a position on, [P], are ones that begin a document without any text."""
        found = np.zeros(len(tokens), dtype=np.bool_)
        found[self._inside(self.document_starts[:-1], start, start + len(tokens)) - start] = True
        found &= (tokens == self.spelling.bos) & (self.spelling.bos != NONE)
        return found

    def require_same_documents(self, other: TextAxis) -> None:
        """Refuse a corpus of other documents.

        Raises:
            SpecMismatch: the texts differ; the message says where first.
        """
        if len(self.hashes) != len(other.hashes):
            raise SpecMismatch(
                f"corpus {self.corpus.name!r} has {counted(len(self.hashes), 'document')}, corpus "
                f"{other.corpus.name!r} has {len(other.hashes):,}; ingest the same sources with both tokenizers"
            )
        differs = next(
            (d for d, pair in enumerate(zip(self.hashes, other.hashes, strict=True)) if pair[0] != pair[1]), None
        )
        if differs is None:
            return
        ours, others = self.text(differs), other.text(differs)
        shorter = min(len(ours), len(others))
        at = next((i for i in range(shorter) if ours[i] != others[i]), shorter)
        shown = [each[max(at - _SHOWN // 2, 0) : at + _SHOWN] for each in (ours, others)]
        raise SpecMismatch(
            f"document {self._named(differs)} differs at byte {at:,}: {shown[0]!r} in corpus {self.corpus.name!r}, "
            f"{shown[1]!r} in {other.corpus.name!r}; ingest the same sources with both tokenizers, neither of which "
            "may change texts"
        )

    def _named(self, document: int) -> str:
        """Count a document from 1, with its file where that is known."""
        sources = self.corpus.spec.sources
        ends = np.cumsum([source.documents for source in sources])
        known = len(ends) and ends[-1] == len(self.hashes)
        file = f", of {sources[int(np.searchsorted(ends, document, side='right'))].name}," if known else ""
        return f"{document + 1:,} of {len(self.hashes):,}{file}"

    def text(self, document: int) -> bytes:
        """Spell a document, at most about a million of its tokens."""
        start, stop = self.document_starts[document : document + 2].tolist()
        tokens, widths, _ = self._widths(start, min(stop, start + _COMPARED))
        return self._spelt(tokens, self._text_widths(start, widths)).tobytes()

    def _survey(self) -> None:
        self._marks[0] = 1
        digest = hashlib.blake2b(digest_size=16)
        for block, start in enumerate(range(0, self.corpus.num_positions, BLOCK)):
            stop = min(start + BLOCK, self.corpus.num_positions)
            tokens, widths, _ = self._widths(start, stop)
            self._marks[block + 1] = self._marks[block] + widths.sum()
            widths = self._text_widths(start, widths)
            spelt = memoryview(self._spelt(tokens, widths).tobytes())
            bounds = np.concatenate([[0], np.cumsum(widths)])
            done = 0
            for first in self._inside(self.document_starts[1:], start + 1, stop + 1).tolist():
                upto = int(bounds[first - start])
                digest.update(spelt[done:upto])
                self.hashes.append(digest.digest())
                digest, done = hashlib.blake2b(digest_size=16), upto
            digest.update(spelt[done:])

    def _widths(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Read tokens, how far each moves on the axis, and 1 for those that end documents without any text."""
        before = min(start, 1)
        read = self.corpus.tokens(start - before, stop).astype(np.int64)
        tokens = read[before:]
        widths = self._lengths[tokens]
        behind = np.zeros_like(widths)
        begun = np.searchsorted(self.document_starts, [start - before, stop])
        firsts, stops = self.document_starts[begun[0] : begun[1]], self.document_starts[begun[0] + 1 : begun[1] + 1]
        firsts = firsts[: len(stops)]
        framed = read[firsts - start + before] == self.spelling.bos
        widths[(firsts[framed & (firsts >= start)]) - start] = 0
        if self.spelling.begins_with_space:
            real = (firsts + framed)[firsts + framed < stops]
            real = real[(real >= start) & (real < stop)] - start
            widths[real] -= self._flat[self._offsets[tokens[real]]] == ord(" ")
        lasts = self._inside(self.document_starts[1:], start + 1, stop + 1) - 1 - start
        ending = lasts[tokens[lasts] == self.spelling.eos]
        widths[ending], behind[ending] = 0, 1
        widths[self._firsts_after(start, stop)] += _BETWEEN
        return tokens, widths, behind

    def _text_widths(self, start: int, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        bytes_only = widths.copy()
        bytes_only[self._firsts_after(start, start + len(widths))] -= _BETWEEN
        return bytes_only

    def _firsts_after(self, start: int, stop: int) -> NDArray[np.int64]:
        """Find the positions from `start` on at which a document other than the first begins."""
        return self._inside(self.document_starts[1:-1], start, stop) - start

    def _spelt(self, tokens: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Spell tokens, of each its last `widths` bytes."""
        begins = self._offsets[tokens + 1] - widths
        shift = np.repeat(begins - (np.cumsum(widths) - widths), widths)
        spelt: NDArray[np.uint8] = self._flat[shift + np.arange(len(shift))]
        return spelt

    @staticmethod
    def _inside(starts: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
        return starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)]
