"""The arrays of one segment: how they are cut into chunks, written and read.

Shape legend:  p positions of the segment, K kept entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.encoding import Encoding, RankTable, StoredArrays, decode
from cache.errors import CorruptSegment, FormatError
from cache.groups import GroupReader, GroupWriter, Layout
from cache.types import Targets

# 128 KiB decoded for 64 one-byte gaps or 32 two-byte ranks: small enough to read one row, large enough for zarr.
_CHUNK_POSITIONS = 2048
# Only ids are cut along K, so that reading the first 32 of 128 touches a quarter of their bytes.
_CHUNK_IDS = 32
_SCALAR_CHUNK = 1 << 15

_RANK_DTYPES = ("uint16", "uint32")
_FLOAT_DTYPES = ("float16", "float32")


def write_targets(writer: GroupWriter, stored: StoredArrays) -> None:
    """Write what `cache.encoding.encode` made."""
    for name, array in stored.items():
        writer.write(name, array, _layout(name, array.shape))


class SegmentReader:
    """Decoded targets of one segment, positions counted from its start."""

    def __init__(self, group: GroupReader, num_positions: int, k: int, encoding: Encoding, ranks: RankTable) -> None:
        self._group = group
        self._encoding = encoding
        self._ranks = ranks
        self._names = ("ids", "gaps" if encoding.name == "u8" else "logprobs", "log_tail", "label_logprob")
        group.expect("ids", (num_positions, k), _RANK_DTYPES)
        if encoding.name == "u8":
            group.expect("gaps", (num_positions, k - 1), ("uint8",))
        else:
            group.expect("logprobs", (num_positions, k), _FLOAT_DTYPES)
        for name in ("log_tail", "label_logprob"):
            group.expect(name, (num_positions,), _FLOAT_DTYPES)

    def read(self, start: int, stop: int) -> Targets:
        """Targets of positions `start` to `stop` of the segment.

        Raises:
            CorruptSegment: stored bytes are damaged, or decode to what no encoder writes.
        """
        stored: StoredArrays = {name: self._group.read(name, start, stop) for name in self._names}
        try:
            targets = decode(stored, self._encoding, self._ranks)
        except FormatError as error:
            raise CorruptSegment(f"{self._group.path}: {error}") from error
        if not _plausible(targets.log_tail):
            raise CorruptSegment(f"{self._group.path}/log_tail holds NaN or a tail of more than all mass")
        return targets


def _layout(name: str, shape: tuple[int, ...]) -> Layout:
    if len(shape) == 1:
        return Layout((_SCALAR_CHUNK,))
    width = min(_CHUNK_IDS, shape[1]) if name == "ids" else max(shape[1], 1)
    return Layout((_CHUNK_POSITIONS, width))


def _plausible(log_tail: NDArray[np.float32]) -> bool:
    return bool((log_tail <= 0).all())
