"""Immutable Zarr v3 groups: written once under a name used once, then only read.

Nearly the only importer of zarr (`ingest.py` streams a corpus through the same writer). A group becomes part of a
cache when a record that lists its objects is created if absent (`Root.create`); until then it is garbage.
Each array is stored in objects of whole Zarr shards, with core codecs only: bitshuffled zstd inside Blosc,
then crc32c on every inner chunk, so that `zarr.open` reads it without this project.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.errors import BaseZarrError
from zarr.storage import ObjectStore, WrapperStore

from cache.errors import CorruptSegment
from cache.store import Root, StoredObject, store_errors

# What a damaged or lying object can make zarr, numcodecs or the store raise while reading.
_READ_FAILURES = (
    BaseError,
    BaseZarrError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    IndexError,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How one array is cut: its inner chunk, and how many elements of axis 0 share one object (None: all)."""

    chunk: tuple[int, ...]
    object_rows: int | None = None


def attempt_name(prefix: str) -> str:
    """A group name that was never used before."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


class GroupWriter:
    """Writes one new group and remembers size and sha256 of every object as it goes out."""

    def __init__(self, root: Root, path: str) -> None:
        self._root = root
        self.path = path
        self._store = _RecordingStore(ObjectStore(root.store), path)
        with store_errors(path):
            self._group = zarr.create_group(self._store, path=path)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, layout: Layout) -> zarr.Array[Any]:
        """A new array; write it in blocks of whole objects, each block once."""
        rows = layout.object_rows or max(shape[0], 1)
        whole = (rows, *shape[1:])
        shards = tuple(math.ceil(max(size, 1) / chunk) * chunk for size, chunk in zip(whole, layout.chunk, strict=True))
        codecs = [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]
        with store_errors(f"{self.path}/{name}"):
            return self._group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=layout.chunk,
                shards=shards,
                compressors=codecs,
                config={"write_empty_chunks": True},
            )

    def write(self, name: str, data: NDArray[Any], layout: Layout) -> None:
        """A whole array at once."""
        array = self.array(name, data.shape, data.dtype, layout)
        if data.size:
            self.put(array, 0, data)

    def put(self, array: zarr.Array[Any], start: int, block: NDArray[Any]) -> None:
        """One block of an array made by `array`, from `start` on axis 0."""
        with store_errors(f"{self.path}/{array.basename}"):
            array[start : start + len(block)] = block

    def finish(self) -> tuple[StoredObject, ...]:
        """Flush to stable storage; every object of the group, sorted by path."""
        self._root.flush(self.path)
        cut = len(self.path) + 1
        return tuple(
            StoredObject(path[cut:], size, sha256) for path, (size, sha256) in sorted(self._store.written.items())
        )


class GroupReader:
    """Reads arrays of one published group, after checking its objects' sizes against the record.

    Shapes and dtypes are compared with what the caller knows they must be, before any byte is decoded.
    """

    def __init__(self, root: Root, path: str, objects: Iterable[StoredObject]) -> None:
        self._root = root
        self.path = path
        self._objects = tuple(objects)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        problem = self.size_problem()
        if problem:
            raise CorruptSegment(problem)

    def size_problem(self) -> str | None:
        """What is missing or of another size than recorded, naming the object; None when all is there."""
        found = self._root.sizes(self.path)
        for item in self._objects:
            size = found.get(item.path)
            if size != item.size:
                state = "is missing" if size is None else f"has {size} bytes"
                return f"{self.path}/{item.path} {state}; its commit recorded {item.size} bytes"
        return None

    def expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> str:
        """Open an array and check its metadata; its dtype's name.

        Raises:
            CorruptSegment: the array is missing or lies about itself.
        """
        array = self._open(name)
        if array.shape != shape or array.dtype.name not in tuple(dtypes):
            raise CorruptSegment(
                f"{self.path}/{name} is {array.dtype}{array.shape}; its commit means {'/'.join(dtypes)}{shape}"
            )
        return str(array.dtype.name)

    def read(self, name: str, start: int, stop: int, columns: int | None = None) -> NDArray[Any]:
        """`array[start:stop]`, or its first `columns` columns.

        Raises:
            CorruptSegment: a chunk fails its checksum or cannot be decoded.
        """
        array = self._open(name)
        try:
            block = array[start:stop] if columns is None else array[start:stop, :columns]
        except _READ_FAILURES as error:
            raise CorruptSegment(f"{self.path}/{name} cannot be read: {error}") from error
        return np.asarray(block)

    def read_all(self, name: str) -> NDArray[Any]:
        """The whole array; see `read`."""
        return self.read(name, 0, self._open(name).shape[0])

    def corrupt_objects(self) -> list[str]:
        """Read every object and compare its sha256: one line for each that is not what was committed."""
        problem = self.size_problem()
        if problem:
            return [problem]
        found = ((item, self._root.sha256(f"{self.path}/{item.path}")) for item in self._objects)
        return [
            f"{self.path}/{item.path} has sha256 {sha256[:16]}..., its commit recorded {item.sha256[:16]}..."
            for item, sha256 in found
            if sha256 != item.sha256
        ]

    def _open(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            self._check_metadata(f"{name}/zarr.json")
            try:
                store = ObjectStore(self._root.store, read_only=True)
                self._arrays[name] = zarr.open_array(store, path=f"{self.path}/{name}", mode="r")
            except _READ_FAILURES as error:
                raise CorruptSegment(f"{self.path}/{name} cannot be opened: {error}") from error
        return self._arrays[name]

    def _check_metadata(self, path: str) -> None:
        """Metadata decides how bytes are read, and has no checksum of its own: compare it whole."""
        recorded = next((item for item in self._objects if item.path == path), None)
        if recorded is None:
            raise CorruptSegment(f"{self.path}/{path} is not among the objects that were committed")
        data = self._root.get(f"{self.path}/{path}")
        if data is None or hashlib.sha256(data).hexdigest() != recorded.sha256:
            raise CorruptSegment(f"{self.path}/{path} is not the one that was committed")


class _RecordingStore(WrapperStore[Store]):
    """Notes size and sha256 of what is written below one path; the last write of a key counts.

    Nothing is written elsewhere: zarr would create the groups above too, and their names are seals
    that only `Root.create` may publish.
    """

    def __init__(self, store: Store, path: str = "") -> None:
        super().__init__(store)
        self._prefix = path + "/"
        self.written: dict[str, tuple[int, str]] = {}

    def _with_store(self, store: Store) -> _RecordingStore:
        return _RecordingStore(store, self._prefix[:-1])

    async def set(self, key: str, value: Buffer) -> None:
        if key.startswith(self._prefix):
            await super().set(key, value)
            self._note(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        # The group's name was never used before, so the key is new.
        await self.set(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    def _note(self, key: str, value: Buffer) -> None:
        data = value.as_buffer_like()
        self.written[key] = (len(memoryview(data).cast("B")), hashlib.sha256(data).hexdigest())


def objects_to_json(objects: Iterable[StoredObject]) -> list[dict[str, Any]]:
    """The objects as a record lists them."""
    return [{"path": o.path, "size": o.size, "sha256": o.sha256} for o in objects]


def objects_from_json(value: Iterable[Mapping[str, Any]]) -> tuple[StoredObject, ...]:
    """Read what `objects_to_json` wrote."""
    return tuple(StoredObject(str(o["path"]), int(o["size"]), str(o["sha256"])) for o in value)
