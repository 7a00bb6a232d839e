"""Kinds of characters, looked up for whole texts at once.

Shape legend:  C characters.
"""

from __future__ import annotations

import re
import sys
from functools import cache

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.words import SPACELESS

SPACE, LETTER, ALONE = np.uint8(1), np.uint8(2), np.uint8(4)
"""White space; letters; letters that are a word each."""


def kinds(text: str) -> NDArray[np.uint8]:
    """The kinds of each character, [C] uint8, as bits."""
    return _table()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]


@cache
def _table() -> NDArray[np.uint8]:
    """The kinds of all characters, [1,114,112] uint8."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    table = np.zeros(len(every), np.uint8)
    for pattern, bit in ((r"\s+", SPACE), (r"[^\W\d_]+", LETTER), (f"[{SPACELESS}]+", ALONE)):
        for found in re.finditer(pattern, every):
            table[found.start() : found.end()] |= bit
    return table
