"""Reading of the stored chunks of an array that is laid out as `GroupWriter` does it, from any store.

Zarr-python's pipeline makes some twenty tasks of each chunk, which all take their turn in one thread and cost more than
decoding. Here one read gets an object's chunks together, and the thread that asked decodes them.

Shape legend:  n chunks, of which all have the same shape; those at the array's edges hold more than the array does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from potstill.cache.errors import CorruptSegment
from potstill.cache.store.array_metadata import ArrayMetadata
from potstill.cache.store.object_ranges import ObjectRanges, Stored, side_by_side
from potstill.cache.store.pipelines import StoredArray, blosc_problem, crc32c_problem

Place: TypeAlias = tuple[int, int]
"""Row and column of a chunk in the grid; an array of one axis has one column."""
_TOGETHER_BYTES = 8 << 20
"""Most decoded bytes of the chunks that one read asks for, so that many still come side by side."""
_KEPT_INDEXES = 64
"""Objects whose index is kept for each array, 16 bytes a chunk: about 1 MiB for the largest."""
_LEAST_BYTES, _MOST_BYTES = 20, 1 << 62
"""Blosc's header and a crc32c; and the end of any object, far below the mark of a chunk that is not there."""
_IN_THREADS = 16
"""Least number of chunks that are decoded by more than one thread: starting them costs as much as some chunks."""


class BloscChunks:
    """Fetches and decodes chunks of one array; thread-safe.

    Errors name the array, and are CorruptSegment for what is damaged, StoreError where the store fails.
    """

    def __init__(self, path: str, metadata: ArrayMetadata, objects: ObjectRanges) -> None:
        self.objects, self._path, self._metadata, self._per_object = objects, path, metadata, metadata.grid
        self._shape, self._chunk, self._dtype = metadata.shape, metadata.chunk, metadata.dtype
        self._indexes: dict[str, NDArray[np.uint64]] = {}

    def decoded(self, first: int, stop: int, columns: int, stored: Mapping[Place, Stored]) -> NDArray[Any]:
        """Decode rows `first` to `stop` of the grid, of each row the first `columns`, to one block of the array."""
        rows = (first * self._chunk[0], min(stop * self._chunk[0], self._shape[0]))
        width = [min(columns * self._chunk[1], self._shape[1])] if len(self._shape) > 1 else []
        block = np.empty((rows[1] - rows[0], *width), dtype=self._dtype)

        def decode(i: int) -> None:
            row, column = divmod(i, columns)
            at = block[row * self._chunk[0] : (row + 1) * self._chunk[0]]
            if width:
                at = at[:, column * self._chunk[1] : (column + 1) * self._chunk[1]]
            self._decode(stored[first + row, column], at)

        count = (stop - first) * columns
        if count < _IN_THREADS:
            for i in range(count):
                decode(i)
        else:
            with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as threads:
                list(threads.map(decode, range(count)))
        return block

    def parts(self, places: Iterable[Place]) -> list[tuple[str, list[Place]]]:
        """Cut places, in order, into what one read asks for: the object's key, and places in it."""
        most = max(_TOGETHER_BYTES // (math.prod(self._chunk) * self._dtype.itemsize), 1)
        parts = []
        for coordinates, inside in groupby(sorted(places, key=self._object), self._object):
            key, here = f"{self._path}/{self._metadata.object_key(coordinates)}", list(inside)
            parts += [(key, here[at : at + most]) for at in range(0, len(here), most)]
        return parts

    def read(self, key: str, places: Sequence[Place]) -> list[Stored]:
        """Read chunks of one object."""
        index = self._index(key)
        rows, columns = index.shape[:2]
        found = index[[row % rows for row, _ in places], [column % columns for _, column in places]]
        if (found[:, 1] < _LEAST_BYTES).any() or (found > _MOST_BYTES).any():
            raise CorruptSegment(f"{key} cannot be read: a chunk is missing or cut short")
        return self.objects.read(key, [(offset, offset + length) for offset, length in found.tolist()])

    def _decode(self, stored: Stored, at: NDArray[Any]) -> None:
        whole = at.shape == self._chunk and at.flags.c_contiguous
        chunk = at if whole else np.empty(self._chunk, dtype=self._dtype)
        problem = blosc_problem(stored[:-4], chunk.nbytes) or crc32c_problem(stored)
        if not problem:
            try:
                blosc.decompress(stored[:-4], chunk)
            except (RuntimeError, ValueError) as error:
                problem = str(error)
        if problem:
            raise CorruptSegment(f"{self._path} cannot be read: {problem}")
        if not whole:
            at[...] = chunk[tuple(slice(size) for size in at.shape)]

    def _object(self, place: Place) -> tuple[int, ...]:
        row, column = place
        return (row // self._per_object[0], *(column // each for each in self._per_object[1:]))

    def _index(self, key: str) -> NDArray[np.uint64]:
        """Offset and length of each chunk of an object, [rows, columns, 2]."""
        index = self._indexes.get(key)
        if index is None:
            rows, columns = (*self._per_object, 1)[:2]
            data = self.objects.read_end(key, rows * columns * 16 + 4)
            if crc32c_problem(data):
                raise CorruptSegment(f"{key} is damaged: its index cannot be read")
            index = np.frombuffer(data[:-4], "<u8").reshape(rows, columns, 2)
            self._indexes[key] = index
            for oldest in list(self._indexes)[:-_KEPT_INDEXES]:
                self._indexes.pop(oldest, None)
        return index


def fetch(wanted: Mapping[BloscChunks, Iterable[Place]]) -> dict[BloscChunks, dict[Place, Stored]]:
    """Read chunks of some arrays, to be `decoded`: those of an object together, and objects side by side.

    Raises:
        CorruptSegment: a chunk or an object's index is missing or damaged. StoreError: the store fails.
    """
    parts = [(chunks, *part) for chunks, places in wanted.items() for part in chunks.parts(places)]
    reads = [partial(chunks.read, key, places) for chunks, key, places in parts]
    # A folder gives its bytes sooner than a thread starts.
    every = [read() for read in reads] if all(chunks.objects.in_folder for chunks in wanted) else side_by_side(reads)
    found: dict[BloscChunks, dict[Place, Stored]] = {chunks: {} for chunks in wanted}
    for (chunks, _, places), stored in zip(parts, every, strict=True):
        found[chunks].update(zip(places, stored, strict=True))
    return found


def blosc_chunks(array: StoredArray) -> BloscChunks | None:
    """Make the reader of an array's chunks; None for one that is laid out otherwise."""
    return None if array.metadata is None else BloscChunks(array.path, array.metadata, ObjectRanges(array.store))
