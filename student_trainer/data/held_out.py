"""The rows that a student is evaluated on and never trained on: whole documents, drawn by a hash of a seed alone.

Rows of one document follow each other, so a student that was trained on some of them has half seen the others:
documents are held out, not rows. Rows elsewhere with the same tokens are left out of training, too; what else is in
their documents is trained on, as a shared licence or heading does not make two texts one.

Shape legend:  R rows of the corpus, D documents, H held-out rows, L rows left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.keys import KEY_BYTES
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.student_trainer.data.order import hashed

_KEYS_AT_ONCE = 1 << 20
_HELD_OUT = np.uint64(3)
"""The salt of these draws; the order of rows has others."""


def choose_held_out(document_rows: NDArray[np.int64], held_out: float, seed: int, name: str) -> NDArray[np.int64]:
    """Draw the rows of held-out documents, [H] indexes, rising.

    Documents are drawn in the order of a hash, and taken if they fit into the rows that are still wanted.

    Args:
        document_rows: [D+1] rows at which documents start, then R.
        held_out: the most rows to take: a count, or a share of R below 1 (then one row at least).
        seed: of the hash.
        name: the corpus's, for errors.

    Raises:
        InvalidInput: no row would be left to train on, or every document has more rows than are wanted.
    """
    num_rows, sizes = int(document_rows[-1]), np.diff(document_rows)
    wanted = int(held_out) if held_out >= 1 or held_out == 0 else max(1, round(held_out * num_rows))
    if wanted >= num_rows:
        raise InvalidInput(
            f"data.held_out is {held_out!r}, but corpus {name!r} has {counted(num_rows, 'row')}; leave some to train on"
        )
    if wanted and wanted < sizes.min():
        one = len(sizes) == 1
        told = f"corpus {name!r} is one document" if one else f"the smallest of {name!r} has {sizes.min():,}"
        raise InvalidInput(
            f"data.held_out is {held_out!r}, {counted(wanted, 'row')}, but whole documents are held out, and {told}; "
            f"{'ingest several, or set it to 0' if one else 'ask for as many, or set it to 0'}"
        )
    documents = np.argsort(hashed(np.arange(len(sizes), dtype=np.int64), seed, _HELD_OUT), kind="stable")
    chosen = np.sort(documents[_that_fit(sizes[documents], wanted)])
    ranges = [np.arange(document_rows[d], document_rows[d + 1], dtype=np.int64) for d in chosen]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def _that_fit(sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Go through sizes [D] and take each that fits into the room that is left; returns the places of those taken."""
    taken, places = [np.zeros(0, np.int64)], np.arange(len(sizes), dtype=np.int64)
    while room and len(places := places[sizes[places] <= room]):
        ends = np.cumsum(sizes[places])
        fit = int(np.searchsorted(ends, room, side="right"))
        taken.append(places[:fit])
        room, places = room - int(ends[fit - 1]), places[fit:]
    return np.concatenate(taken)


def num_documents(document_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> int:
    """Count the documents that rows are of."""
    return len(np.unique(np.searchsorted(document_rows, rows, side="right")))


def with_copies(corpora: Sequence[Corpus], held_out: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Add to the held-out rows of each corpus every row of it that has the tokens of one held out anywhere.

    None of the result, [L] rising for each corpus, may be trained on. Where rows repeat, or there are several corpora,
    the keys of all rows are read twice from end to end, 16 bytes a row.
    """
    alone = len(corpora) == 1 and corpora[0].spec.duplicate_rows == 0
    if alone or not any(map(len, held_out)):
        return list(held_out)
    pairs = zip(corpora, held_out, strict=True)
    wanted = np.unique(np.concatenate([keys for corpus, rows in pairs for keys in _keys_of(corpus, rows)]))
    return [
        np.concatenate([start + np.flatnonzero(np.isin(keys, wanted)) for start, keys in _keys(corpus)])
        for corpus in corpora
    ]


def _keys_of(corpus: Corpus, rows: NDArray[np.int64]) -> Iterator[NDArray[np.bytes_]]:
    for start, keys in _keys(corpus):
        yield keys[rows[(rows >= start) & (rows < start + len(keys))] - start]


def _keys(corpus: Corpus) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
    """Read all row keys in blocks: the first row of a block, and the block's keys."""
    for start in range(0, len(corpus), _KEYS_AT_ONCE):
        block = corpus.row_keys(start, min(start + _KEYS_AT_ONCE, len(corpus)))
        yield start, np.ascontiguousarray(block).reshape(-1).view(f"S{KEY_BYTES}")
