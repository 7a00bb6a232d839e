"""Documents that were there before: exact copies, and near ones by MinHash, with the numbers of FineWeb.

Of two texts whose runs of five words are to 75% the same, the second is found with a probability of 77%, of 85% with
99%, of 50% with 5%. Memory grows by 12 bytes a document for exact copies and by 168 for near ones.

Shape legend:  N documents, M words.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.known_hashes import NONE, KnownHashes
from potstill.cache.text.words import ngram_hashes

_BANDS, _ROWS = 14, 8
_SHINGLE = 5
_SEED = 1


class ExactCopies:
    """Texts that were seen, but for white space at their ends."""

    def __init__(self) -> None:
        self._known = KnownHashes()

    def seen(self, texts: Sequence[str], numbers: NDArray[np.uint32]) -> list[int]:
        """Tell of N texts with numbers [N] which they copy, in the same list or earlier ones: its number, or `NONE`."""
        hashes = np.array([_hashed(text) for text in texts], np.uint64)
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        here = first[which]
        in_this = np.where(here < np.arange(len(hashes)), numbers[here].astype(np.int64), NONE)
        known = self._known.numbers(hashes)
        found = np.where(known == NONE, in_this, known)
        fresh = found == NONE
        self._known.add(hashes[fresh], numbers[fresh])
        return list(map(int, found))


class NearCopies:
    """Texts that were seen, by bands of their MinHash."""

    def __init__(self) -> None:
        self._known = KnownHashes()

    def seen(self, texts: Sequence[NDArray[np.uint64]], numbers: NDArray[np.uint32]) -> list[int]:
        """Tell of N texts with numbers [N] which earlier one they are like that was like none: its number, or `NONE`.

        Each text is given as the hashes of its words [M], at least one.
        """
        bands = _bands(texts)
        known = self._known.numbers(bands.reshape(-1)).reshape(bands.shape)
        found, fresh = [_most_frequent(row[row != NONE].tolist()) for row in known], dict[int, int]()
        for n, number in enumerate(numbers.tolist()):
            if found[n] == NONE:
                mine = bands[n].tolist()
                found[n] = _most_frequent([fresh[band] for band in mine if band in fresh])
                if found[n] == NONE:
                    fresh.update(dict.fromkeys(mine, number))
        self._known.add(np.fromiter(fresh, np.uint64), np.fromiter(fresh.values(), np.uint32))
        return found


def _most_frequent(numbers: Sequence[int]) -> int:
    return Counter(numbers).most_common(1)[0][0] if numbers else NONE


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
