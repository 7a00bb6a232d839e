"""Words of a text as numbers, so that runs of words are compared without making a string of each.

Shape legend:  W words, N words of a run.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

_RANGES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
SPACELESS = f"{_RANGES}\U00020000-\U0003ffff"
"""Letters, for a pattern's brackets, of scripts without spaces: Chinese, Japanese, Thai, Lao, Burmese, Khmer."""
_ALONE = re.compile(f"[{SPACELESS}]")
_WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
_NO_WORD = re.compile(r"[^\w\s]|_")
_ASCII = {
    **{code: None for code in range(128) if not chr(code).isspace() and not chr(code).isalnum()},
    **{ord(letter): letter.lower() for letter in string.ascii_uppercase},
}
# Odd, so that it has an inverse modulo 2**64.
_FACTOR = 0x9E3779B97F4A7C15
_BLOCK = 1 << 18
_SPACE = ord(" ")


def normalised(text: str) -> str:
    """Write a text's words in small letters, without punctuation, with one space between any two.

    As GPT-3's authors and lm-eval compare texts; beside that, letters in other forms (NFKC) are one, and each letter
    of a script without spaces is a word.
    """
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    text = unicodedata.normalize("NFKC", text).lower()
    text = _NO_WORD.sub("", text)
    return " ".join(_WORD.findall(text) if _ALONE.search(text) else text.split())


def word_hashes(words: str) -> NDArray[np.uint64]:
    """Hash each word of a text that has one space between any two, [W]; the same on every machine."""
    encoded = words.encode()
    data = np.frombuffer(encoded, dtype=np.uint8)
    blocks, at = [np.empty(0, np.uint64)], 0
    while at < data.size:
        block = data[at : at + _BLOCK]
        spaces = np.flatnonzero(block == _SPACE)
        if at + _BLOCK < data.size and spaces.size:
            block, spaces = block[: spaces[-1]], spaces[:-1]
        blocks.append(_hashed(block, spaces))
        # A word that is longer than a block, as data in base64 is, is known by its beginning.
        end = encoded.find(b" ", at + block.size)
        at = data.size if end < 0 else end + 1
    return np.concatenate(blocks)


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash each run of `n` words, [W - n + 1] of words [W]; empty where there are fewer."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    # By doubling: runs of 13 are of 8, 4 and 1.
    found, length, doubled, width = np.zeros(len(words) + 1, np.uint64), 0, words, 1
    while True:
        if n & width:
            count = len(words) - length - width + 1
            found = found[:count] * _power(width) + doubled[length : length + count]
            length += width
        if length == n:
            return _mixed(found)
        doubled = doubled[:-width] * _power(width) + doubled[width:]
        width *= 2


def _power(n: int) -> np.uint64:
    return np.uint64(pow(_FACTOR, n, 1 << 64))


def _hashed(block: NDArray[np.uint8], spaces: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash the words of bytes between spaces at these places."""
    powers, inverses = _powers()
    starts, ends = np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [block.size]])
    # A polynomial of the bytes before each place; a word's is the difference of two, moved to the front.
    sums = np.zeros(block.size + 1, np.uint64)
    np.cumsum((block.astype(np.uint64) + np.uint64(1)) * powers[: block.size], out=sums[1:])
    return _mixed((sums[ends] - sums[starts]) * inverses[starts])


@cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Powers of the factor and of its inverse, [_BLOCK + 1] each."""
    factors = np.ones((2, _BLOCK + 1), np.uint64)
    factors[0, 1:] = _FACTOR
    factors[1, 1:] = pow(_FACTOR, -1, 1 << 64)
    powers, inverses = np.cumprod(factors, axis=1)
    return powers, inverses


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread what differs over all bits (the end of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
