"""Encoding of targets to stored arrays and back: top-k logprobs, the fields beside them, and the measured error.

Pure functions of arrays; `archive` is the encoding for cold storage.
"""

from __future__ import annotations

from potstill.cache.encoding.gaps import load_compiled
from potstill.cache.encoding.logprobs import ENCODINGS, Encoding, RankTable, decode, encode

__all__ = ["ENCODINGS", "Encoding", "RankTable", "decode", "encode", "load_compiled"]
