"""Opening of a Zarr array for reading with one of two codec pipelines, which give the same bytes.

    stock    zarr-python's own
    zarrs    the optional package of that name: faster. Used on local folders only: it rebuilds any other store from
             its settings, without our wrapper, and there the network is the limit. A child that was forked after its
             parent used it takes `stock`, as the threads stay in the parent

Chunks are checked before either pipeline decodes them: the decoded size in the Blosc header always, the crc32c for
zarrs. A damaged chunk of 270 KB may claim to decode to 2 GiB; numcodecs allocates and fills that before zarr sees
the wrong shape, and zarrs 0.2.3 returns the chunk's beginning as if nothing were wrong. zarrs 0.2.3 also skips the
crc32c of inner chunks: of 300 flipped bits in an object 271 gave wrong numbers without an error.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.registry import register_codec
from zarr.storage import LocalStore, ObjectStore, StorePath, WrapperStore

from potstill.cache.errors import CorruptSegment, InvalidInput, StoreError
from potstill.cache.forks import PerProcess, cached, is_inherited
from potstill.cache.store.array_metadata import ArrayMetadata
from potstill.cache.store.object_stores import store_error

PIPELINES: Final = ("stock", "zarrs")

# zarr's settings belong to the process, and an array takes them at the moment it is opened: one opening at a time.
_OPENING: Final = PerProcess(threading.Lock)
_STOCK_SETTINGS: Final = {
    "codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "codecs.blosc": "potstill.cache.store.pipelines.BoundedBlosc",
}
_ZARRS_SETTINGS: Final = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
# Blosc 1: four bytes of versions and flags, then the decoded size, the block size and the encoded size.
_BLOSC_HEADER = struct.Struct("<4xIII")
# Shard indexes kept per array, 16 bytes a chunk: about 1 MiB for the largest objects.
_KEPT_INDEXES = 64


def codec_pipeline(forced: str | None = None) -> str:
    """Choose the pipeline to open arrays with: `forced`, else "zarrs" when it can be imported, else "stock".

    Raises:
        InvalidInput: `forced` is unknown, or is "zarrs" where that is not installed.
    """
    if forced not in {None, *PIPELINES}:
        raise InvalidInput(f"codec pipeline {forced!r} is unknown; known are {', '.join(PIPELINES)}")
    if forced == "stock":
        return forced
    try:
        importlib.import_module("zarrs")
    except ImportError as error:
        if forced is None:
            return "stock"
        raise InvalidInput("codec pipeline 'zarrs' is not installed; `pip install zarrs` or take 'stock'") from error
    return "zarrs"


def zarr_store(store: Any, *, read_only: bool = False) -> Store:
    """The zarr store of a folder (a `Path`) or of an obstore store."""
    return (
        LocalStore(store, read_only=read_only) if isinstance(store, Path) else ObjectStore(store, read_only=read_only)
    )


@dataclass(frozen=True)
class StoredArray:
    """One array of a folder (a `Path`) or an obstore store, as its metadata describes it."""

    store: Any
    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: dict[str, Any]
    metadata: ArrayMetadata | None
    """The metadata; None where the array is laid out otherwise than by `GroupWriter`."""
    by_zarrs: bool
    """Whether zarrs reads it."""
    open_zarr: Callable[[], zarr.Array[Any]]

    @cached
    def by_zarr(self) -> zarr.Array[Any]:
        """The array to be read by zarr's pipelines, opened when it is first asked for.

        Raises:
            ValueError: the pipeline does not know how the array is encoded.
        """
        return self.open_zarr()


def open_array(store: Any, path: str, metadata: bytes, pipeline: str) -> StoredArray:
    """Open the array at `path` of a folder or an obstore store, read-only, to be read by `pipeline`.

    The store is not asked: `metadata` is what it has as `zarr.json` below the path. zarr's settings are restored
    afterwards. Errors that zarr raises for damaged metadata come through.
    """
    ours = ArrayMetadata.parse(metadata)
    if ours is not None:
        by_zarrs = pipeline != "stock" and isinstance(store, Path) and not is_inherited("zarrs")
        open_zarr = partial(_open_zarrs, store, path, metadata)
        return StoredArray(store, path, ours.shape, ours.chunk, ours.dtype, ours.attributes, ours, by_zarrs, open_zarr)
    found = _open(_StoreErrors(zarr_store(store, read_only=True)), path, metadata, _STOCK_SETTINGS)
    if not isinstance(found.metadata, ArrayV3Metadata):
        raise TypeError("it is no array of Zarr 3")
    grids = [found.chunks] if found.shards is None else [found.chunks, found.shards]
    if any(length < 1 for grid in grids for length in grid):
        raise ValueError(f"its chunk grid is {grids[-1]}; a chunk has at least one entry along every axis")
    attributes = found.attrs.asdict()
    return StoredArray(
        store, path, found.shape, found.chunks, found.dtype, attributes, None, by_zarrs=False, open_zarr=lambda: found
    )


def _open_zarrs(store: Any, path: str, metadata: bytes) -> zarr.Array[Any]:
    # Strict: an encoding that zarrs does not know is an error here, not a warning and a silent detour.
    unsupported = importlib.import_module("zarrs.pipeline").UnsupportedMetadataError
    try:
        return _open(zarr_store(store, read_only=True), path, metadata, _ZARRS_SETTINGS)
    except unsupported as error:
        raise ValueError(str(error)) from error


def _open(store: Store, path: str, metadata: bytes, settings: dict[str, Any]) -> zarr.Array[Any]:
    # `zarr.open_array` would read the metadata itself, by a task of zarr's event loop: most of the time of an opening.
    register_codec("blosc", BoundedBlosc)
    with _OPENING.get(), zarr.config.set(settings):
        return zarr.Array(zarr.AsyncArray(json.loads(metadata), StorePath(store, path)))


class BoundedBlosc(BloscCodec):
    """zarr's Blosc codec, which first refuses a chunk whose header states other sizes than it must have."""

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        dtype = chunk_spec.dtype.to_native_dtype()
        problem = blosc_problem(chunk_bytes.as_numpy_array(), math.prod(chunk_spec.shape) * dtype.itemsize)
        if problem:
            raise ValueError(problem)
        return await super()._decode_single(chunk_bytes, chunk_spec)


class EncodedChunks:
    """Checks the stored chunks of a local array before zarrs decodes them.

    An array of one axis counts as having one chunk on axis 1.
    """

    def __init__(self, metadata: ArrayMetadata, folder: Path) -> None:
        self._folder, self._metadata, self._per_object = folder, metadata, metadata.grid
        self._nbytes = math.prod(metadata.chunk) * metadata.dtype.itemsize
        self._indexes: dict[tuple[int, ...], NDArray[np.uint64]] = {}

    def check(self, first: int, stop: int, columns: int) -> None:
        """Check the chunks `first` to `stop` on axis 0, and of each of these the first `columns` on axis 1.

        Raises:
            CorruptSegment: the object is missing or cut short, a chunk is damaged or would decode to another size.
            StoreError: it cannot be read.
        """
        rows_each = self._per_object[0]
        columns_each = self._per_object[1] if len(self._per_object) > 1 else 1
        for row in range(first // rows_each, -(-stop // rows_each)):
            inside = slice(max(first - row * rows_each, 0), min(stop - row * rows_each, rows_each))
            for column in range(-(-columns // columns_each)):
                width = min(columns - column * columns_each, columns_each)
                self._check_object((row, column)[: len(self._per_object)], inside, width)

    def _check_object(self, coordinates: tuple[int, ...], rows: slice, columns: int) -> None:
        path = self._folder / self._metadata.object_key(coordinates)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                index = self._index(coordinates, file.fileno(), size)
                for offset, length in index[rows, :columns].reshape(-1, 2).tolist():
                    encoded = os.pread(file.fileno(), length, offset) if offset + length <= size else b""
                    problem = blosc_problem(encoded[:-4], self._nbytes) or crc32c_problem(encoded)
                    if problem:
                        raise CorruptSegment(f"{path} cannot be read: {problem}")
        except FileNotFoundError as error:
            raise CorruptSegment(f"{path} is missing") from error
        except OSError as error:
            raise StoreError(f"{path}: {error}; mend access, then run it again") from error

    def _index(self, coordinates: tuple[int, ...], file: int, size: int) -> NDArray[np.uint64]:
        """Offset and length of each chunk of an object, [rows, columns, 2]; zarrs checks its crc32c."""
        if coordinates not in self._indexes:
            rows, columns = (*self._per_object, 1)[:2]
            length = rows * columns * 16
            data = os.pread(file, length, size - length - 4) if length + 4 <= size else b""
            if len(data) != length:
                raise CorruptSegment(f"{self._folder} is cut short: chunk {coordinates} has no index")
            self._indexes[coordinates] = np.frombuffer(data, "<u8").reshape(rows, columns, 2)
        return self._indexes[coordinates]


def encoded_chunks(array: StoredArray) -> EncodedChunks | None:
    """The checks to make before reading `array`; None when zarrs does not read it."""
    if array.metadata is None or not array.by_zarrs:
        return None
    return EncodedChunks(array.metadata, array.store / array.path)


def blosc_problem(encoded: bytes | NDArray[np.uint8], expected: int) -> str | None:
    """Describe why a chunk, without a crc32c, cannot decode to so many bytes, by its header; None when it can.

    Blosc reads as many bytes as the header states, also beyond the end of the chunk.
    """
    if len(encoded) < _BLOSC_HEADER.size:
        return "a chunk is missing or cut short"
    decoded, _, stated = _BLOSC_HEADER.unpack(bytes(encoded[: _BLOSC_HEADER.size]))
    if decoded != expected:
        return f"a chunk would decode to {decoded} bytes instead of {expected}"
    return None if stated == len(encoded) else f"a chunk has {len(encoded)} bytes, but its header says {stated}"


def crc32c_problem(encoded: bytes | NDArray[np.uint8]) -> str | None:
    """Describe stored bytes that are not those of the crc32c at their end; None when they are."""
    expected = int.from_bytes(encoded[-4:], "little")
    return None if google_crc32c.value(encoded[:-4]) == expected else "a chunk's crc32c differs"


class _StoreErrors(WrapperStore[Store]):
    """A zarr store that says what a failed read means: a store that does not answer is no damage, a missing object is.

    Without it zarr would read a missing or empty object as fill values. It also keeps the ends of objects, which are
    the shard indexes that zarr asks for at every read; objects never change.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._indexes: OrderedDict[tuple[str, int], Buffer] = OrderedDict()
        self._lock = PerProcess(threading.Lock)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        suffix = (key, byte_range.suffix) if isinstance(byte_range, SuffixByteRequest) else None
        if suffix is not None and suffix in self._indexes:
            return self._indexes[suffix]
        try:
            found = await self._store.get(key, prototype, byte_range)
        except (BaseError, OSError) as error:
            if await self._is_outside(key, byte_range):
                raise CorruptSegment(f"{key} is cut short: a chunk lies beyond its end") from error
            raise store_error(key, error) from error
        if not found:
            raise CorruptSegment(f"{key} is {'missing' if found is None else 'empty'}")
        if suffix is not None and found is not None:
            self._keep(suffix, found)
        return found

    def _keep(self, suffix: tuple[str, int], found: Buffer) -> None:
        with self._lock.get():
            self._indexes[suffix] = found
            if len(self._indexes) > _KEPT_INDEXES:
                self._indexes.popitem(last=False)

    async def _is_outside(self, key: str, byte_range: ByteRequest | None) -> bool:
        """Tell whether the store refused because the object ends before the range does."""
        try:
            size = await self._store.getsize(key)
        except FileNotFoundError:
            return True
        except (BaseError, OSError):
            return False
        if isinstance(byte_range, RangeByteRequest):
            return byte_range.end > size
        if isinstance(byte_range, OffsetByteRequest):
            return byte_range.offset > size
        return isinstance(byte_range, SuffixByteRequest) and byte_range.suffix > size
