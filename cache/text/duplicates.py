"""Documents that were there before: exact copies, and near ones by MinHash, with the numbers of FineWeb.

Of two texts whose runs of five words are to 75% the same, the second is found with a probability of 77%, of 85% with
99%, of 50% with 5%. Memory grows by 8 bytes a document for exact copies and by 112 for near ones.

Shape legend:  N documents, M words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.known_hashes import KnownHashes
from potstill.cache.text.words import ngram_hashes

_BANDS, _ROWS = 14, 8
_SHINGLE = 5
_SEED = 1


class ExactCopies:
    """Texts that were seen, but for white space at their ends."""

    def __init__(self) -> None:
        self._known = KnownHashes()

    def seen(self, texts: Sequence[str]) -> list[bool]:
        """Tell of N texts which were there before, in the same list or earlier ones."""
        hashes = np.array([_hashed(text) for text in texts], np.uint64)
        known = self._known.has(hashes)
        first = np.zeros(len(hashes), np.bool_)
        first[np.unique(hashes, return_index=True)[1]] = True
        self._known.add(hashes[first & ~known])
        return list(map(bool, known | ~first))


class NearCopies:
    """Texts that were seen, by bands of their MinHash."""

    def __init__(self) -> None:
        self._known = KnownHashes()

    def seen(self, texts: Sequence[NDArray[np.uint64]]) -> list[bool]:
        """Tell of N texts, each as the hashes of its words [M], at least one, which are like one that was not."""
        bands = _bands(texts)
        found = np.array(self._known.has(bands.reshape(-1)).reshape(bands.shape).any(axis=1))
        fresh: set[int] = set()
        for n in np.flatnonzero(~found):
            mine = bands[n].tolist()
            found[n] = not fresh.isdisjoint(mine)
            if not found[n]:
                fresh.update(mine)
        self._known.add(np.fromiter(fresh, np.uint64))
        return list(map(bool, found))


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def _bands(texts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Hash the bands [N, _BANDS] of texts; shorter ones than a run of words are one run."""
    import rensa  # noqa: PLC0415 -- an extra's

    if not texts:
        return np.empty((0, _BANDS), np.uint64)
    runs = [ngram_hashes(words, max(1, min(_SHINGLE, len(words)))) for words in texts]
    offsets = np.cumsum([0, *map(len, runs)], dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(runs), offsets.tolist(), _BANDS * _ROWS, _SEED
    )
    rows = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(texts), _BANDS, _ROWS)
    # The number of the band is part of its hash, so that all bands lie in one set.
    numbers = np.broadcast_to(np.arange(_BANDS, dtype=np.uint64)[:, None], (len(texts), _BANDS, 1))
    flat = np.concatenate([numbers, rows], axis=2).reshape(-1)
    return ngram_hashes(flat, _ROWS + 1)[:: _ROWS + 1].reshape(len(texts), _BANDS)
