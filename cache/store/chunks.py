"""Reads of position ranges from sharded Zarr arrays, chunk by chunk, each compared with its recorded crc32c.

A chunk that a read uses only in part is kept for the next read, in a cache that several arrays share. A chunk that
is used whole is not, so that a scan does not push out what random reads want. All of it is thread-safe.

Shape legend:  p positions of an array, K columns.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zarr.core.sync import sync
from zarr.errors import BaseZarrError

from potstill.cache.errors import CorruptSegment
from potstill.cache.forks import PerProcess
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.store.blosc_chunks import BloscChunks, Place, blosc_chunks, fetch
from potstill.cache.store.pipelines import StoredArray, encoded_chunks

# What a damaged or lying object can make zarr, numcodecs or zarrs raise while decoding.
_DECODE_FAILURES = (BaseZarrError, ValueError, TypeError, KeyError, RuntimeError, IndexError, OSError)
# Decoded bytes that one fetch may hold beside its answers: many chunks at a time hide the store's latency, but a
# request for a whole shard must not hold it twice.
_FETCH_BYTES = 64 << 20
# Least number of chunks that zarrs reads where it can: it takes tasks of zarr's event loop and reads each chunk twice.
_BY_ZARRS = 16


def chunk_checksums(data: NDArray[Any], chunk: tuple[int, ...]) -> NDArray[np.uint32]:
    """The crc32c of every chunk of `data`, uint32, in C order of the chunk grid.

    It is computed over the chunk's elements inside the array, as C-order little-endian bytes, before any codec.
    """
    grid = [range(0, size, step) for size, step in zip(data.shape, chunk, strict=True)]
    sums = (
        _crc32c(data[tuple(slice(at, at + step) for at, step in zip(corner, chunk, strict=True))])
        for corner in product(*grid)
    )
    return np.fromiter(sums, np.uint32)


class ChunkCache:
    """A least-recently-used cache of decoded chunks that holds at most `max_bytes`; thread-safe.

    `hits` and `misses` count the calls of `get`.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._chunks: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self.num_bytes = 0
        """Bytes held now."""
        self._lock = PerProcess(threading.Lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty cache of the same size."""
        return type(self), (self.max_bytes,)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._chunks

    def get(self, key: Hashable, *, is_miss: bool = True) -> NDArray[Any] | None:
        """The chunk under `key`, read-only, or None, which counts as a miss unless it will be asked for again."""
        # Without the lock, which readers would queue for: each of these calls is whole to other threads.
        try:
            chunk = self._chunks[key]
            self._chunks.move_to_end(key)
        except KeyError:
            self.misses += is_miss
            return None
        self.hits += 1
        return chunk

    def put(self, key: Hashable, chunk: NDArray[Any]) -> None:
        """Keep a chunk, which nobody may change from now on; one larger than `max_bytes` is not kept."""
        # Every reader gets this same array, so one that wrote to it would change the answers of the others.
        chunk.setflags(write=False)
        if chunk.nbytes > self.max_bytes:
            return
        with self._lock.get():
            replaced = self._chunks.pop(key, None)
            self._chunks[key] = chunk
            self.num_bytes += chunk.nbytes - (0 if replaced is None else replaced.nbytes)
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._chunks.popitem(last=False)[1].nbytes


class TiledArray:
    """One published array [p] or [p, K], read in whole chunks.

    `array` comes from `open_array`; the caller has already checked its shape and dtype. `path` names the array in
    errors, `key` in the cache. `checksums` come from `chunk_checksums`, or are None where none were recorded.
    """

    def __init__(
        self,
        array: StoredArray,
        path: str,
        checksums: NDArray[np.uint32] | None,
        cache: ChunkCache,
        key: Hashable,
    ) -> None:
        rows, columns = (*(-(-size // step) for size, step in zip(array.shape, array.chunk, strict=True)), 1)[:2]
        if checksums is not None and checksums.shape != (rows * columns,):
            raise CorruptSegment(f"{path} has {rows * columns} chunks, {checksums.size} checksums were recorded")
        self.path = path
        self.shape: tuple[int, ...] = array.shape
        self.chunk: tuple[int, ...] = array.chunk
        self.dtype: np.dtype[Any] = array.dtype
        self._array = array
        self._encoded = encoded_chunks(array)
        self._blosc = blosc_chunks(array)
        self._sums = None if checksums is None else checksums.reshape(rows, columns)
        self._cache = cache
        self._key = key

    def read(self, start: int, stop: int, columns: int | None = None) -> NDArray[Any]:
        """Read `array[start:stop]`, or its first `columns` columns; the answer may be read-only.

        Raises:
            CorruptSegment: a chunk is damaged, missing or not the recorded one. StoreError: the store failed.
        """
        return read_together([ReadRequest(self, start, stop, columns)])[0]

    def kept(self, row: int, column: int) -> NDArray[Any] | None:
        """The chunk at a place of the chunk grid if the cache has it, else None."""
        return self._cache.get((self._key, row, column))

    def held(self, start: int, stop: int, columns: int | None) -> NDArray[Any] | None:
        """The answer of `read` as a view, where the cache has one chunk that holds all of it; else None."""
        assert 0 <= start <= stop <= self.shape[0], "a range inside the array"
        row, at = divmod(start, self.chunk[0])
        if at + stop - start > self.chunk[0]:
            return None
        if len(self.shape) == 1:
            chunk = self._cache.get((self._key, row, 0), is_miss=False)
            return None if chunk is None else chunk[at : at + stop - start]
        width = self.shape[1] if columns is None else min(columns, self.shape[1])
        chunk = None if width > self.chunk[1] else self._cache.get((self._key, row, 0), is_miss=False)
        return None if chunk is None else chunk[at : at + stop - start, :width]

    def reader_of(self, num_chunks: int) -> BloscChunks | None:
        """The reader of so many chunks; None where one of zarr's pipelines reads them."""
        return None if self._encoded is not None and num_chunks >= _BY_ZARRS else self._blosc

    def keep(self, row: int, column: int, chunk: NDArray[Any]) -> None:
        """Keep a chunk for later reads."""
        self._cache.put((self._key, row, column), chunk)

    async def by_zarr(self, wanted: _ChunkRange) -> NDArray[Any]:
        """Read the chunks of a range by zarr's pipeline; their crc32c is not compared yet."""
        if self._encoded is not None:
            self._encoded.check(wanted.first, wanted.stop, wanted.columns)
        rows = slice(wanted.first * self.chunk[0], min(wanted.stop * self.chunk[0], self.shape[0]))
        try:
            if len(self.shape) == 1:
                block = await self._array.by_zarr.async_array.getitem(rows)
            else:
                width = min(wanted.columns * self.chunk[1], self.shape[1])
                block = await self._array.by_zarr.async_array.getitem((rows, slice(0, width)))
        except _DECODE_FAILURES as error:
            raise CorruptSegment(f"{self.path} cannot be read: {error}") from error
        return np.asarray(block)

    def check(self, row: int, column: int, chunk: NDArray[Any]) -> None:
        """Compare a decoded chunk with its recorded crc32c.

        Raises:
            CorruptSegment: they differ.
        """
        if self._sums is not None and _crc32c(chunk) != int(self._sums[row, column]):
            raise CorruptSegment(f"{self.path} chunk ({row}, {column}) is not what was committed: its crc32c differs")


class ReadRequest(NamedTuple):
    """One range of positions of one array, and the first `columns` columns of it."""

    array: TiledArray
    start: int
    stop: int
    columns: int | None = None


class _Wanted(NamedTuple):
    """A request whose chunks are looked for."""

    array: TiledArray
    start: int
    stop: int
    rows: range
    """Indices on axis 0 of the chunks that hold the range."""
    columns: int
    """Number of chunks on axis 1 that hold the columns; 1 for an array of one axis."""
    shape: tuple[int, ...]
    """Shape of the answer."""

    @classmethod
    def of(cls, request: ReadRequest) -> _Wanted:
        """Look up the chunks of a request."""
        array, start, stop, columns = request
        size, widths = array.chunk[0], array.shape[1:]
        width = widths if columns is None else tuple(min(columns, each) for each in widths)
        column_chunks = -(-width[0] // array.chunk[1]) if width else 1
        return cls(array, start, stop, range(start // size, -(-stop // size)), column_chunks, (stop - start, *width))

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded rows of chunks."""
        return len(self.rows) * self.array.chunk[0] * math.prod(self.shape[1:]) * self.array.dtype.itemsize

    def uses_whole(self, row: int) -> bool:
        """Tell whether the range covers all of chunk `row` on axis 0."""
        size = self.array.chunk[0]
        return self.start <= row * size and min((row + 1) * size, self.array.shape[0]) <= self.stop


@dataclass(frozen=True, slots=True)
class _ChunkRange:
    """A range of one array's chunks: rows `first` to `stop` of the chunk grid, the first `columns` columns."""

    array: TiledArray
    first: int
    stop: int
    columns: int


class _ChunkFetch:
    """The chunks that several requests need, each read once, and all that are missing from the cache together."""

    def __init__(self, requests: Sequence[_Wanted]) -> None:
        self._kept: dict[tuple[TiledArray, int, int], NDArray[Any]] = {}
        self._blocks: dict[tuple[TiledArray, int], tuple[_ChunkRange, NDArray[Any]]] = {}
        whole = {(request.array, row) for request in requests for row in request.rows if request.uses_whole(row)}
        for held, block in _blocks(self._missing(requests)):
            self._take(held, block, whole)

    def answer(self, request: _Wanted) -> NDArray[Any]:
        """The array that was asked for; a view, not a copy, where one block or chunk holds all of it."""
        array, rows, columns = request.array, request.rows, request.columns
        held, block = self._blocks.get((array, rows.start), (None, None))
        if held is not None and block is not None and held.stop >= rows.stop and held.columns >= columns:
            origin = held.first * array.chunk[0]
        else:
            parts = [self._row(array, row, columns) for row in rows]
            block = parts[0] if len(parts) == 1 else np.concatenate(parts)
            origin = rows.start * array.chunk[0]
        answer = block[request.start - origin : request.stop - origin]
        return answer if answer.ndim == 1 else answer[:, : request.shape[1]]

    def _row(self, array: TiledArray, row: int, columns: int) -> NDArray[Any]:
        held, block = self._blocks.get((array, row), (None, None))
        if held is not None and block is not None and held.columns >= columns:
            size = array.chunk[0]
            rows = block[(row - held.first) * size : (row - held.first + 1) * size]
            return rows if rows.ndim == 1 else rows[:, : columns * array.chunk[1]]
        chunks = [self._kept[array, row, column] for column in range(columns)]
        return chunks[0] if columns == 1 else np.concatenate(chunks, axis=1)

    def _missing(self, requests: Sequence[_Wanted]) -> dict[TiledArray, dict[int, int]]:
        """Chunks to read: by array and chunk row, how many on axis 1. Those in the cache are taken from there."""
        missing: dict[TiledArray, dict[int, int]] = {}
        for request in requests:
            for row in request.rows:
                if not self._take_kept(request.array, row, request.columns):
                    rows = missing.setdefault(request.array, {})
                    rows[row] = max(rows.get(row, 0), request.columns)
        return missing

    def _take_kept(self, array: TiledArray, row: int, columns: int) -> bool:
        for column in range(columns):
            if (array, row, column) not in self._kept:
                chunk = array.kept(row, column)
                if chunk is None:
                    return False
                self._kept[array, row, column] = chunk
        return True

    def _take(self, held: _ChunkRange, block: NDArray[Any], whole: set[tuple[TiledArray, int]]) -> None:
        array, size = held.array, held.array.chunk[0]
        block.setflags(write=False)
        for row in range(held.first, held.stop):
            self._blocks[array, row] = (held, block)
            rows = block[(row - held.first) * size : (row - held.first + 1) * size]
            for column in range(held.columns):
                width = array.chunk[-1]
                chunk = rows if rows.ndim == 1 else rows[:, column * width : (column + 1) * width]
                if (array, row) in whole:
                    array.check(row, column, np.ascontiguousarray(chunk))
                    continue
                if chunk.size < block.size:
                    # A copy of its own: a view would keep the whole block in memory.
                    chunk = chunk.copy()
                array.check(row, column, chunk)
                array.keep(row, column, chunk)


def read_together(requests: Sequence[ReadRequest]) -> list[NDArray[Any]]:
    """Read several ranges; one array per request, in order, which may be read-only and share memory with others.

    Chunks that are not in the cache are read concurrently, each once and neighbours together. Many requests are cut
    into fetches of about 64 MiB of decoded chunks.

    Raises:
        CorruptSegment: a chunk is damaged, missing or not the recorded one. StoreError: the store failed.
    """
    answers = [array.held(start, stop, columns) for array, start, stop, columns in requests]
    missing = {i: _Wanted.of(requests[i]) for i, held in enumerate(answers) if held is None}
    # By position, so that requests which share a chunk land in the same fetch and it is decoded once.
    order = sorted((i for i in missing if 0 not in missing[i].shape), key=lambda i: missing[i].start)
    for start, stop in row_batches(row_starts([missing[i].num_bytes for i in order]), _FETCH_BYTES):
        fetch = _ChunkFetch([missing[i] for i in order[start:stop]])
        for i in order[start:stop]:
            answers[i] = fetch.answer(missing[i])
    empty = (np.empty(wanted.shape, wanted.array.dtype) for wanted in missing.values() if 0 in wanted.shape)
    return [next(empty) if answer is None else answer for answer in answers]


def _chunk_ranges(missing: dict[TiledArray, dict[int, int]]) -> Iterator[_ChunkRange]:
    """Join neighbouring chunk rows of which the same columns are wanted into one range."""
    for array, rows in missing.items():
        held: _ChunkRange | None = None
        for row, columns in sorted(rows.items()):
            if held is not None and (held.stop, held.columns) == (row, columns):
                held = _ChunkRange(array, held.first, row + 1, columns)
                continue
            if held is not None:
                yield held
            held = _ChunkRange(array, row, row + 1, columns)
        if held is not None:
            yield held


def _blocks(missing: dict[TiledArray, dict[int, int]]) -> Iterator[tuple[_ChunkRange, NDArray[Any]]]:
    """Read the missing chunks side by side, and give each range of them with its block."""
    readers = {array: array.reader_of(sum(rows.values())) for array, rows in missing.items()}
    found = fetch({reader: _places(missing[array]) for array, reader in readers.items() if reader is not None})
    rest = []
    for held in _chunk_ranges(missing):
        reader = readers[held.array]
        if reader is None:
            rest.append(held)
        else:
            yield held, reader.decoded(held.first, held.stop, held.columns, found[reader])
    if rest:
        yield from zip(rest, sync(_by_zarr(rest)), strict=True)


def _places(rows: dict[int, int]) -> list[Place]:
    return [(row, column) for row, columns in rows.items() for column in range(columns)]


async def _by_zarr(ranges: Sequence[_ChunkRange]) -> list[NDArray[Any]]:
    # Waits for all of them also when one fails: nothing is left running behind the caller's back.
    every = await asyncio.gather(*(held.array.by_zarr(held) for held in ranges), return_exceptions=True)
    blocks: list[NDArray[Any]] = []
    for block in every:
        if isinstance(block, BaseException):
            raise block
        blocks.append(block)
    return blocks


def _crc32c(chunk: NDArray[Any]) -> int:
    # Little-endian on every machine: the checksum lies on disk.
    data = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    return int(google_crc32c.value(data.view(np.uint8)))
