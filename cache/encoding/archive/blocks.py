"""The header and checksum of a block of the `archive` encoding, and the rows' own tokens that it is coded with.

A block starts with

    magic  version  kind   positions  k or draws   vocabulary   crc32 of the context and of all words
    "PA"   u8       u8     u32        u32          u32          u32

and goes on with little-endian words of 32 bits.

Shape legend:  p positions of a block.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import FormatError, InvalidInput

if TYPE_CHECKING:
    from potstill.cache.encoding.archive.model import Links

NO_LABEL = 0xFFFFFFFF
"""Value in `Context.labels` at a row's last position."""
MAX_K = 2048
"""Most kept entries, and most draws, at a position."""
TOP_K, DRAWS = 1, 2
_VERSION = 1
_HEADER = struct.Struct("<2sBBIIII")


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Tokens of a block's positions as ranks; the corpus gives them for coding and for decoding."""

    tokens: NDArray[np.uint32]
    """[p] rank of the position's own token."""
    labels: NDArray[np.uint32]
    """[p] rank of the next token of the row; `NO_LABEL` at the row's end."""
    begins_row: NDArray[np.bool_]
    """[p] True at the first position of a row."""


def links(context: Context) -> Links:
    """Links from each position to similar earlier ones, by their tokens."""
    from potstill.cache.encoding.archive.model import Links  # noqa: PLC0415 -- as in pack_top_k

    tokens = context.tokens.astype(np.int64)
    positions = np.arange(len(tokens))
    begins = context.begins_row.copy()
    begins[:1] = True
    before = np.where(begins, -1, np.roll(tokens, 1))
    labels = np.where(context.labels == NO_LABEL, -1, context.labels.astype(np.int64))
    return Links(
        same=_last_same(tokens),
        same_before=_last_same(tokens << 32 | before + 1),
        same_after=_last_same(tokens << 32 | labels + 1),
        row_begins=np.maximum.accumulate(np.where(begins, positions, 0)),
        labels=labels,
    )


def _last_same(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Last earlier position [p] with an equal key, -1 for none."""
    order = np.argsort(keys, kind="stable")
    last = np.full(len(keys), -1, dtype=np.int64)
    equal = keys[order[1:]] == keys[order[:-1]]
    last[order[1:][equal]] = order[:-1][equal]
    return last


def framed(kind: int, positions: int, k: int, vocab_size: int, context: Context, words: NDArray[np.uint32]) -> bytes:
    """Bytes of a block: header and words."""
    body = words.astype("<u4").tobytes()
    return _HEADER.pack(b"PA", _VERSION, kind, positions, k, vocab_size, checksum(context, body)) + body


def unframed(data: bytes, kind: int, positions: int, k: int, vocab_size: int, context: Context) -> NDArray[np.uint32]:
    """Check a block, and return its words.

    Raises:
        FormatError: it is damaged, or not the block that is expected here.
    """
    if len(data) < _HEADER.size + 8 or (len(data) - _HEADER.size) % 4:
        raise FormatError(f"an archive block has {len(data)} bytes, which none can have")
    magic, version, *rest, expected_checksum = _HEADER.unpack_from(data)
    if magic != b"PA" or version != _VERSION:
        raise FormatError(
            f"an archive block starts with {data[:3].hex()}; this version reads {b'PA'.hex()}{_VERSION:02x}"
        )
    expected = [kind, positions, k, vocab_size]
    if rest != expected:
        raise FormatError(f"an archive block has kind, positions, k and vocabulary {rest}, expected are {expected}")
    if not 1 <= k <= MAX_K:
        raise FormatError(f"an archive block cannot have {k} entries; 1 to {MAX_K} can be")
    body = data[_HEADER.size :]
    if checksum(context, body) != expected_checksum:
        raise FormatError("an archive block, or the corpus it is read with, is not what was written")
    return np.frombuffer(body, dtype="<u4").astype(np.uint32)


def checksum(context: Context, body: bytes) -> int:
    """Crc32 of the context and of a block's words: decoding with other tokens would give wrong ids silently."""
    crc = 0
    for array in (context.tokens.astype("<u4"), context.labels.astype("<u4"), context.begins_row.astype("u1")):
        crc = zlib.crc32(array.tobytes(), crc)
    return zlib.crc32(body, crc)


def check_context(context: Context, positions: int, vocab_size: int) -> None:
    """Refuse a context that does not fit a block.

    Raises:
        InvalidInput: an array has another length, or a rank is over the vocabulary.
    """
    for name, array in (("tokens", context.tokens), ("labels", context.labels), ("begins_row", context.begins_row)):
        if array.shape != (positions,):
            raise InvalidInput(f"{name} has shape {array.shape}, the block has {positions} positions")
    labels = context.labels[context.labels != NO_LABEL]
    most = max(int(context.tokens.max(initial=0)), int(labels.max(initial=0)))
    if most >= vocab_size:
        raise InvalidInput(f"a token's rank is {most}, the vocabulary has {vocab_size}")
