"""Immutable Zarr v3 groups: written once under a name used once, then only read.

A group becomes part of a cache when a record that lists its objects is created if absent (`Root.create`); until then
it is garbage. Each object of an array is one Zarr shard. Only core codecs are used, zstd inside Blosc and then crc32c
on every inner chunk, so that `zarr.open` reads the arrays without this project.

The array `checksums` holds the crc32c of the decoded chunks of all other arrays. A chunk that is intact but in the
wrong place (objects swapped, a shard copied over another) passes its codec's own checksum and fails this one.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.errors import BaseZarrError

from potstill.cache.errors import CorruptSegment, StoreError
from potstill.cache.forks import PerProcess
from potstill.cache.store.chunks import ChunkCache, ReadRequest, TiledArray, chunk_checksums
from potstill.cache.store.new_arrays import GROUP_METADATA, Layout, NewArray
from potstill.cache.store.pipelines import StoredArray, codec_pipeline, open_array
from potstill.cache.store.publishing import loss
from potstill.cache.store.root import Root, StoredObject

CHECKSUMS = "checksums"
# Errors that zarr raises for metadata that it cannot use, written by another version of it.
_OPEN_FAILURES = (BaseZarrError, ArithmeticError, ValueError, TypeError, KeyError, RuntimeError, OSError)
# Size of Blosc's header: no chunk is stored in less.
_LEAST_CHUNK_BYTES = 16
_CHECKSUM_CHUNK = 1 << 16
# What a reader keeps of decoded chunks when its opener gives it no larger cache to share.
_OWN_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Reading:
    """Means to read groups: a cache of decoded chunks that they share, and a codec pipeline (`store.pipelines`)."""

    chunks: ChunkCache
    pipeline: str

    @classmethod
    def open(cls, cache_bytes: int = _OWN_CACHE_BYTES, pipeline: str | None = None) -> Reading:
        """Make a new chunk cache, and choose `pipeline` or else the fastest one that is installed.

        Raises:
            InvalidInput: the pipeline is unknown or not installed.
        """
        return cls(ChunkCache(cache_bytes), codec_pipeline(pipeline))


def attempt_name(prefix: str) -> str:
    """A group name that no other attempt has: `prefix` and 48 random bits."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


@contextmanager
def removed_on_failure(root: Root, path: str) -> Iterator[None]:
    """Remove the group at `path` when the block fails or is cancelled; no record may name it yet."""
    try:
        yield
    except BaseException:
        root.delete(path)
        raise


class GroupWriter:
    """Writes one new group, and notes size and sha256 of every object as it goes out."""

    def __init__(self, root: Root, path: str) -> None:
        self._root = root
        self.path = path
        self._written: dict[str, tuple[int, str]] = {}
        self._checksums: dict[str, list[NDArray[np.uint32]]] = {}
        self._write("zarr.json", GROUP_METADATA)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, layout: Layout) -> NewArray:
        """Create an array, to be filled by `put` in order, in blocks of whole objects, each once."""
        self._checksums[name] = []
        return self._create(name, shape, dtype, layout, {})

    def write(self, name: str, data: NDArray[Any], layout: Layout) -> None:
        """Create an array and write all of it."""
        array = self.array(name, data.shape, data.dtype, layout)
        if data.size:
            self.put(array, 0, data)

    def put(self, array: NewArray, start: int, block: NDArray[Any]) -> None:
        """Write one block of an array that `array` made, from `start` on axis 0."""
        self._checksums[array.name].append(chunk_checksums(block, array.chunk))
        self._put(array, start, block)

    def finish(self) -> tuple[StoredObject, ...]:
        """Write the checksums, flush to stable storage, and return the group's objects, sorted by path.

        Raises:
            StoreError: the store is full or cannot be written, or somebody removed a part of the group meanwhile.
        """
        flat = {name: np.concatenate([*parts, np.empty(0, np.uint32)]) for name, parts in self._checksums.items()}
        counts = {name: len(values) for name, values in flat.items()}
        every = np.concatenate([*flat.values(), np.empty(0, np.uint32)]).astype(np.uint32)
        array = self._create(CHECKSUMS, every.shape, every.dtype, Layout((_CHECKSUM_CHUNK,)), {"chunks": counts})
        if every.size:
            self._put(array, 0, every)
        self._root.flush(self.path)
        written = tuple(StoredObject(path, size, sha256) for path, (size, sha256) in sorted(self._written.items()))
        # A writer that was stopped for long may have been taken for dead, and its group for garbage.
        problem = loss(self._root, self.path, written)
        if problem is not None:
            raise StoreError(f"{problem} while its group was written; run it again")
        return written

    def _create(
        self, name: str, shape: tuple[int, ...], dtype: Any, layout: Layout, attributes: dict[str, Any]
    ) -> NewArray:
        array = NewArray(name, shape, dtype, layout, attributes)
        self._write(f"{name}/zarr.json", array.metadata.to_json())
        return array

    def _put(self, array: NewArray, start: int, block: NDArray[Any]) -> None:
        for key, data in array.objects(start, block):
            self._write(f"{array.name}/{key}", data)

    def _write(self, path: str, data: bytes) -> None:
        self._root.put(f"{self.path}/{path}", data)
        self._written[path] = len(data), hashlib.sha256(data).hexdigest()


class GroupReader:
    """Reads arrays of one published group; thread-safe.

    Raises:
        CorruptSegment: an object is missing or has another size than the commit recorded.
    """

    def __init__(self, root: Root, path: str, objects: Iterable[StoredObject], reading: Reading | None = None) -> None:
        self._root = root
        self.path = path
        self._objects = {item.path: item for item in objects}
        self.reading = reading or Reading.open()
        self._arrays: PerProcess[dict[str, TiledArray]] = PerProcess(dict)
        self._checksums: dict[str, NDArray[np.uint32]] | None = None
        problem = self.size_problem()
        if problem:
            raise CorruptSegment(problem)

    def size_problem(self) -> str | None:
        """Describe the first object that is missing or has another size than recorded; None when all are right."""
        found = self._root.sizes(self.path)
        for item in self._objects.values():
            size = found.get(item.path)
            if size != item.size:
                state = "is missing" if size is None else f"has {size} bytes"
                return f"{self.path}/{item.path} {state}; its commit recorded {item.size} bytes"
        return None

    def has(self, name: str) -> bool:
        """Tell whether the group has an array of this name."""
        return f"{name}/zarr.json" in self._objects

    def expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> str:
        """Open an array, check its shape and dtype before any chunk is decoded, and return the dtype's name.

        Raises:
            CorruptSegment: the array is missing, or has another shape or dtype.
        """
        array = self.array(name)
        if array.shape != shape or array.dtype.name not in tuple(dtypes):
            raise CorruptSegment(
                f"{self.path}/{name} is {array.dtype}{array.shape}; its commit means {'/'.join(dtypes)}{shape}"
            )
        return str(array.dtype.name)

    def length(self, name: str) -> int:
        """Number of elements on axis 0."""
        return int(self.array(name).shape[0])

    def read(self, name: str, start: int, stop: int, columns: int | None = None) -> NDArray[Any]:
        """Read `array[start:stop]`, or its first `columns` columns.

        Raises:
            CorruptSegment: a chunk fails its checksum or cannot be decoded. StoreError: the store does not answer.
        """
        return self.array(name).read(start, stop, columns)

    def request(self, name: str, start: int, stop: int, columns: int | None = None) -> ReadRequest:
        """Make the request by which `read_together` reads what `read` does, concurrently with others."""
        return ReadRequest(self.array(name), start, stop, columns)

    def array(self, name: str) -> TiledArray:
        """Open an array for many requests; raises as `expect`."""
        arrays = self._arrays.get()
        if name not in arrays:
            checksums = self._checksums_of(name)
            arrays[name] = self._tiled(self._stored(name), checksums)
        return arrays[name]

    def read_all(self, name: str) -> NDArray[Any]:
        """Read the whole array; see `read`."""
        return self.read(name, 0, self.length(name))

    def corrupt_objects(self) -> list[str]:
        """Read every object and compare its sha256: one line for each that is not what was committed."""
        problem = self.size_problem()
        if problem:
            return [problem]
        found = ((item, self._root.sha256(f"{self.path}/{item.path}")) for item in self._objects.values())
        return [
            f"{self.path}/{item.path} has sha256 {sha256[:16]}..., its commit recorded {item.sha256[:16]}..."
            for item, sha256 in found
            if sha256 != item.sha256
        ]

    def _tiled(self, array: StoredArray, checksums: NDArray[np.uint32] | None) -> TiledArray:
        try:
            return TiledArray(array, array.path, checksums, self.reading.chunks, array.path)
        except _OPEN_FAILURES as error:
            raise CorruptSegment(f"{array.path} cannot be opened: {error}") from error

    def _stored(self, name: str) -> StoredArray:
        metadata = self._whole(f"{name}/zarr.json")
        path = f"{self.path}/{name}"
        try:
            return open_array(self._root.store, path, metadata, self.reading.pipeline)
        except _OPEN_FAILURES as error:
            raise CorruptSegment(f"{path} cannot be opened: {error}") from error

    def _checksums_of(self, name: str) -> NDArray[np.uint32] | None:
        if not self.has(CHECKSUMS):
            return None  # written by format 1
        if self._checksums is None:
            stored = self._stored(CHECKSUMS)
            counts = self._chunk_counts(stored)
            # Everything else is compared with these, and two groups of equal sizes may have changed places with their
            # checksums. Only the sha256 in the record tells them apart.
            for path in self._objects:
                if path.startswith(f"{CHECKSUMS}/c/"):
                    self._whole(path)
            values = self._tiled(stored, None).read(0, stored.shape[0])
            ends = np.cumsum(list(counts.values()))
            self._checksums = {
                each: values[end - count : end] for (each, count), end in zip(counts.items(), ends, strict=True)
            }
        if name not in self._checksums:
            raise CorruptSegment(f"{self.path}/{CHECKSUMS} has nothing about {name!r}")
        return self._checksums[name]

    def _chunk_counts(self, stored: StoredArray) -> dict[str, int]:
        """Number of chunks of each array, checked: a damaged count must not make us allocate without bound."""
        counts = stored.attributes.get("chunks")
        most = sum(item.size for item in self._objects.values()) // _LEAST_CHUNK_BYTES
        if (
            not isinstance(counts, dict)
            or not all(type(count) is int and 0 <= count <= most for count in counts.values())
            or (stored.shape, stored.dtype.name, stored.chunk)
            != ((sum(counts.values()),), "uint32", (_CHECKSUM_CHUNK,))
            or stored.shape[0] > most
        ):
            raise CorruptSegment(f"{self.path}/{CHECKSUMS} does not say which chunks it is of")
        return counts

    def _whole(self, path: str) -> bytes:
        """Read an object and compare its sha256 with the record: metadata and checksums have no crc32c of their own."""
        recorded = self._objects.get(path)
        if recorded is None:
            raise CorruptSegment(f"{self.path}/{path} is not among the objects that were committed")
        data = self._root.get(f"{self.path}/{path}")
        if data is None or hashlib.sha256(data).hexdigest() != recorded.sha256:
            raise CorruptSegment(f"{self.path}/{path} is not the one that was committed")
        return data


def objects_from_json(value: Iterable[Mapping[str, Any]]) -> tuple[StoredObject, ...]:
    """Read the objects that a record lists."""
    return tuple(StoredObject(str(o["path"]), int(o["size"]), str(o["sha256"])) for o in value)
