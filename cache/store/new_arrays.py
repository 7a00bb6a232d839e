"""Encoding of arrays that are being written, to the bytes that zarr-python writes for them.

Zarr-python makes tasks and threads of each chunk, each object and each metadata file: of a small group that was nine
tenths of the CPU time. Here the thread that asked encodes, and others help with what is large.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from potstill.cache.store.array_metadata import SHUFFLES, ArrayMetadata

GROUP_METADATA = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2).encode()
"""Content of a group's `zarr.json`."""
# Offset and length of a chunk that is not there.
_ABSENT = (1 << 64) - 1
# Bytes of a block that more than one thread encodes: for less, starting them costs as much as some chunks.
_IN_THREADS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Chunking and compression of one array."""

    chunk: tuple[int, ...]
    """Shape of the inner chunks."""
    object_rows: int | None = None
    """Elements of axis 0 that share one object (a Zarr shard); None for all."""
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "bitshuffle"
    level: int = 5
    """Compression level of zstd inside Blosc."""


class NewArray:
    """An array of a group that is being written; it holds none of the data."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: Any, layout: Layout, attributes: dict[str, Any]
    ) -> None:
        self.name, self.chunk = name, layout.chunk
        whole = (layout.object_rows or max(shape[0], 1), *shape[1:])
        grid = tuple(math.ceil(max(size, 1) / chunk) for size, chunk in zip(whole, layout.chunk, strict=True))
        kind = np.dtype(dtype).newbyteorder("<")
        self.metadata = ArrayMetadata(shape, kind, layout.chunk, grid, layout.shuffle, layout.level, attributes)

    def objects(self, start: int, block: NDArray[Any]) -> Iterator[tuple[str, bytes]]:
        """Encode a block that begins at `start` on axis 0 and ends with an object; gives each object's key and bytes.

        The keys are relative to the array's path.
        """
        shape, rows = self.metadata.shape, self.metadata.grid[0] * self.chunk[0]
        assert start % rows == 0, "a block begins with an object"
        assert block.shape[1:] == shape[1:], "all columns are written at once"
        for at in range(0, len(block), rows):
            key = self.metadata.object_key(((start + at) // rows, *[0] * (len(shape) - 1)))
            yield key, self._object(block[at : at + rows])

    def _object(self, block: NDArray[Any]) -> bytes:
        """Encode one object: chunks in zarr's order, then where each of them lies."""
        held = [range(-(-size // chunk)) for size, chunk in zip(block.shape, self.chunk, strict=True)]
        places = sorted(product(*held), key=self._morton)
        encode = partial(self._chunk, block)
        if block.nbytes >= _IN_THREADS_BYTES and len(places) > 1:
            with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode") as threads:
                parts = list(threads.map(encode, places))
        else:
            parts = [encode(place) for place in places]
        index = np.full((*self.metadata.grid, 2), _ABSENT, "<u8")
        end = 0
        for place, part in zip(places, parts, strict=True):
            index[place] = end, len(part)
            end += len(part)
        return b"".join([*parts, _with_crc32c(index.tobytes())])

    def _chunk(self, block: NDArray[Any], place: tuple[int, ...]) -> bytes:
        dtype = self.metadata.dtype
        within = tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, self.chunk, strict=True))
        chunk = np.ascontiguousarray(block[within], dtype)
        if chunk.shape != self.chunk:
            # A chunk at the array's edge is stored whole.
            padded = np.zeros(self.chunk, dtype)
            padded[tuple(map(slice, chunk.shape))] = chunk
            chunk = padded
        shuffle, flat = SHUFFLES.index(self.metadata.shuffle), chunk.reshape(-1).view(np.uint8)
        return _with_crc32c(blosc.compress(flat, b"zstd", self.metadata.level, shuffle, 0, dtype.itemsize))

    def _morton(self, place: tuple[int, ...]) -> int:
        """Number of a chunk in an object: the bits of its coordinates in turn, from the lowest, as far as each goes."""
        bits = [(count - 1).bit_length() for count in self.metadata.grid]
        turns = [(axis, bit) for bit in range(max(bits)) for axis in range(len(bits)) if bit < bits[axis]]
        return sum((place[axis] >> bit & 1) << number for number, (axis, bit) in enumerate(turns))


def _with_crc32c(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(4, "little")
