"""Metadata of an array as `GroupWriter` lays one out: the content of its `zarr.json`, written and read back.

Zarr-python takes a millisecond and a half to open an array, most of it to find out about codecs that are always the
same. What is laid out otherwise, by another version of zarr say, is left to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
"""Names of Blosc's filters, by their number."""
_CRC32C = {"name": "crc32c"}
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True, slots=True)
class ArrayMetadata:
    """Shape, cuts and compression of one array: chunks of zstd inside Blosc and a crc32c, in objects with an index."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Of little-endian elements."""
    chunk: tuple[int, ...]
    """Shape of the chunks."""
    grid: tuple[int, ...]
    """Chunks of an object along each axis."""
    shuffle: str
    level: int
    attributes: dict[str, Any]

    @classmethod
    def parse(cls, data: bytes) -> ArrayMetadata | None:
        """Read the content of a `zarr.json`; None where it says anything that `to_json` would not."""
        try:
            found = json.loads(data)
            sharding = found["codecs"][0]["configuration"]
            compression = sharding["codecs"][1]["configuration"]
            chunk, whole = sharding["chunk_shape"], found["chunk_grid"]["configuration"]["chunk_shape"]
            made = cls(
                tuple(found["shape"]),
                np.dtype(found["data_type"]).newbyteorder("<"),
                tuple(chunk),
                tuple(size // step for size, step in zip(whole, chunk, strict=True)),
                compression["shuffle"],
                compression["clevel"],
                found["attributes"],
            )
            same = made._is_possible() and made._content() == found
        except (LookupError, TypeError, ValueError, ArithmeticError):
            return None
        return made if same else None

    def to_json(self) -> bytes:
        """Make the content of the array's `zarr.json`, which is what zarr-python writes."""
        return json.dumps(self._content(), indent=2).encode()

    def object_key(self, coordinates: Iterable[int]) -> str:
        """Key of the object at a place of the grid of objects, relative to the array."""
        return "/".join(["c", *map(str, coordinates)])

    def _is_possible(self) -> bool:
        """Tell whether the sizes are those of an array of one or two axes."""
        sizes = (*self.chunk, *self.grid)
        return (
            len(self.shape) in (1, 2)
            and len(self.shape) == len(self.chunk)
            and all(type(size) is int and size >= 1 for size in sizes)
            and all(type(size) is int and size >= 0 for size in self.shape)
            and type(self.level) is int
            and self.shuffle in SHUFFLES
            and self.dtype.kind in "biuf"
            and isinstance(self.attributes, dict)
        )

    def _content(self) -> dict[str, Any]:
        whole = [count * size for count, size in zip(self.grid, self.chunk, strict=True)]
        return {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.dtype.type(0).item(),
            "codecs": [{"name": "sharding_indexed", "configuration": self._sharding()}],
            "attributes": self.attributes,
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def _sharding(self) -> dict[str, Any]:
        compression = {
            "typesize": self.dtype.itemsize,
            "cname": "zstd",
            "clevel": self.level,
            "shuffle": self.shuffle,
            "blocksize": 0,
        }
        in_order = {"name": "bytes"} if self.dtype.itemsize == 1 else _LITTLE_ENDIAN
        return {
            "chunk_shape": list(self.chunk),
            "codecs": [in_order, {"name": "blosc", "configuration": compression}, _CRC32C],
            "index_codecs": [_LITTLE_ENDIAN, _CRC32C],
            "index_location": "end",
        }
