"""Reading of the stored chunks of an array that is laid out as `GroupWriter` does it, from any store.

Zarr-python's pipeline makes some twenty tasks of each chunk, which all take their turn in one thread and cost more than
decoding. Here one read gets neighbouring chunks together, and the thread that asked decodes them.

Shape legend:  n chunks, of which all have the same shape; those at the array's edges hold more than the array does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata

from potstill.cache.errors import CorruptSegment
from potstill.cache.store.pipelines import blosc_problem, crc32c_problem, is_bounded_blosc

Stored: TypeAlias = NDArray[np.uint8]
"""Bytes of a chunk as it is stored."""
_NOTHING: Stored = np.zeros(0, np.uint8)
_Place: TypeAlias = tuple[int, int]
"""Row and column of a chunk in the grid; an array of one axis has one column."""
_TOGETHER_BYTES = 8 << 20
"""Most stored bytes that one read asks for, so that many chunks still come side by side."""
_LEAST_BYTES, _MOST_BYTES = 20, 1 << 62
"""Blosc's header and a crc32c; and the end of any object, far below the mark of a chunk that is not there."""
_IN_THREADS = 16
"""Least number of chunks that are decoded by more than one thread: starting them costs as much as some chunks."""


class BloscChunks:
    """Fetches and decodes chunks of one array; thread-safe.

    Errors name the array, and are CorruptSegment for what is damaged, StoreError where the store fails.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        assert array.shards is not None, "as `blosc_chunks` checked"
        assert isinstance(array.metadata, ArrayV3Metadata), "as `blosc_chunks` checked"
        self._store, self._path, self._metadata = array.store, array.path, array.metadata
        self._per_object = tuple(s // c for s, c in zip(array.shards, array.chunks, strict=True))
        self._shape, self._chunk, self._dtype = array.shape, array.chunks, array.dtype

    async def fetch(self, first: int, stop: int, columns: int) -> list[Stored]:
        """Read the chunks of rows `first` to `stop` of the grid, of each row the first `columns`, in that order."""
        places = [(row, column) for row in range(first, stop) for column in range(columns)]
        objects = [
            (coordinates, list(inside))
            for coordinates, inside in groupby(sorted(places, key=self._object), self._object)
        ]
        # Waits for all of them also when one fails: nothing is left running behind the caller's back.
        every = await asyncio.gather(*(self._from_object(*each) for each in objects), return_exceptions=True)
        found: dict[_Place, Stored] = {}
        for part in every:
            if isinstance(part, BaseException):
                raise part
            found.update(part)
        return [found[place] for place in places]

    def decoded(self, first: int, columns: int, stored: Sequence[Stored]) -> NDArray[Any]:
        """Decode the chunks that `fetch` gave to one block of the array."""
        rows = (first * self._chunk[0], min((first + len(stored) // columns) * self._chunk[0], self._shape[0]))
        width = [min(columns * self._chunk[1], self._shape[1])] if len(self._shape) > 1 else []
        block = np.empty((rows[1] - rows[0], *width), dtype=self._dtype)

        def decode(i: int) -> None:
            row, column = divmod(i, columns)
            at = block[row * self._chunk[0] : (row + 1) * self._chunk[0]]
            if width:
                at = at[:, column * self._chunk[1] : (column + 1) * self._chunk[1]]
            self._decode(stored[i], at)

        if len(stored) < _IN_THREADS:
            for i in range(len(stored)):
                decode(i)
        else:
            with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as threads:
                list(threads.map(decode, range(len(stored))))
        return block

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

    def _object(self, place: _Place) -> tuple[int, ...]:
        row, column = place
        return (row // self._per_object[0], *(column // each for each in self._per_object[1:]))

    async def _from_object(self, coordinates: tuple[int, ...], places: Sequence[_Place]) -> dict[_Place, Stored]:
        key = f"{self._path}/{self._metadata.encode_chunk_key(coordinates)}"
        index = await self._index(key)
        rows, columns = index.shape[:2]
        ends = {(row, column): index[row % rows, column % columns].tolist() for row, column in places}
        if any(length < _LEAST_BYTES or offset + length > _MOST_BYTES for offset, length in ends.values()):
            raise CorruptSegment(f"{key} cannot be read: a chunk is missing or cut short")
        spans = list(_spans(ends))
        reads = (self._get(key, start, stop) for start, stop, _ in spans)
        every = await asyncio.gather(*reads, return_exceptions=True)
        found: dict[_Place, Stored] = {}
        for data, (start, _, inside) in zip(every, spans, strict=True):
            if isinstance(data, BaseException):
                raise data
            for place in inside:
                offset, length = ends[place]
                found[place] = data[offset - start : offset - start + length]
        return found

    async def _index(self, key: str) -> NDArray[np.uint64]:
        """Offset and length of each chunk of an object, [rows, columns, 2]; the store keeps it."""
        rows, columns = (*self._per_object, 1)[:2]
        length = rows * columns * 16 + 4
        found = await self._store.get(key, default_buffer_prototype(), SuffixByteRequest(length))
        data = _NOTHING if found is None else found.as_numpy_array()
        if len(data) != length or crc32c_problem(data):
            raise CorruptSegment(f"{key} is cut short or damaged: its index cannot be read")
        return np.frombuffer(data[:-4], "<u8").reshape(rows, columns, 2)

    async def _get(self, key: str, start: int, stop: int) -> Stored:
        found = await self._store.get(key, default_buffer_prototype(), RangeByteRequest(start, stop))
        data = _NOTHING if found is None else found.as_numpy_array()
        if len(data) != stop - start:
            raise CorruptSegment(f"{key} is cut short: a chunk lies beyond its end")
        return data


def blosc_chunks(array: zarr.Array[Any]) -> BloscChunks | None:
    """Make the reader of an array's chunks; None for one that is laid out otherwise."""
    return BloscChunks(array) if is_bounded_blosc(array) else None


def _spans(ends: dict[_Place, list[int]]) -> Iterator[tuple[int, int, list[_Place]]]:
    """Join chunks, each with offset and length, that lie one after the other: start, stop and chunks of a read."""
    start = stop = 0
    inside: list[_Place] = []
    for place, (offset, length) in sorted(ends.items(), key=lambda each: each[1]):
        if inside and offset == stop and offset + length - start <= _TOGETHER_BYTES:
            stop = offset + length
            inside.append(place)
            continue
        if inside:
            yield start, stop, inside
        start, stop, inside = offset, offset + length, [place]
    if inside:
        yield start, stop, inside
