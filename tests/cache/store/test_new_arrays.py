"""What is written is byte for byte what zarr-python writes, and its metadata are read without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from potstill.cache.store.array_metadata import ArrayMetadata
from potstill.cache.store.groups import GroupWriter
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.root import Root


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((500, 4), "float16", Layout((128, 4))),
        ((37, 10), "uint32", Layout((4, 3), 8, "shuffle", 1)),
        ((90, 21), "uint8", Layout((7, 2), None, "noshuffle")),
        ((5,), "bool", Layout((2,), 3)),
        ((70_000, 5), "float64", Layout((1 << 12, 2), 1 << 14)),  # many chunks, in threads
        ((0, 6), "int64", Layout((16, 6))),
        ((9, 0), "float32", Layout((16, 1))),
    ],
)
def test_objects_and_metadata_are_those_of_zarr(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, layout: Layout
) -> None:
    data = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 99, shape).astype(dtype)
    writer = GroupWriter(Root.open(tmp_path / "ours", create=True), "group")
    writer.write("values", data, layout)
    written = {item.path: item.size for item in writer.finish()}
    _write_by_zarr(tmp_path / "zarrs" / "group", data, layout)
    ours, theirs = (_files(tmp_path / name / "group") for name in ("ours", "zarrs"))
    assert {path: len(content) for path, content in ours.items()} == written
    assert {path: content for path, content in ours.items() if not path.startswith("checksums/")} == theirs
    metadata = ArrayMetadata.parse(theirs["values/zarr.json"])
    assert metadata is not None
    assert (metadata.shape, metadata.dtype, metadata.chunk) == (data.shape, data.dtype, layout.chunk)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("shape", [500, -4]),
        ("shape", [500, 4, 1]),
        ("shape", 7),
        ("data_type", "object"),
        ("data_type", "int32"),
        ("fill_value", 1),
        ("codecs", []),
        ("codecs/0/configuration/chunk_shape", [0, 4]),
        ("codecs/0/configuration/chunk_shape", [True, 4]),
        ("codecs/0/configuration/chunk_shape", [100, 4]),
        ("codecs/0/configuration/index_location", "start"),
        ("codecs/0/configuration/codecs/1/configuration/cname", "lz4"),
        ("codecs/0/configuration/codecs/1/configuration/shuffle", ["shuffle"]),
        ("attributes", []),
        ("dimension_names", ["p", "k"]),
    ],
)
def test_metadata_that_say_anything_else_are_left_to_zarr(path: str, value: object) -> None:
    good = ArrayMetadata((500, 4), np.dtype("float16"), (128, 4), (4, 1), "shuffle", 5, {})
    assert ArrayMetadata.parse(good.to_json()) == good
    found: Any = json.loads(good.to_json())
    *folders, name = path.split("/")
    inner = found
    for key in folders:
        inner = inner[int(key) if key.isdigit() else key]
    inner[name] = value
    assert ArrayMetadata.parse(json.dumps(found).encode()) is None


def _write_by_zarr(folder: Path, data: np.ndarray[Any, Any], layout: Layout) -> None:
    whole = (layout.object_rows or max(len(data), 1), *data.shape[1:])
    array = zarr.create_group(folder).create_array(
        "values",
        shape=data.shape,
        dtype=data.dtype,
        chunks=layout.chunk,
        shards=tuple(-(-max(size, 1) // step) * step for size, step in zip(whole, layout.chunk, strict=True)),
        compressors=[BloscCodec(cname="zstd", clevel=layout.level, shuffle=layout.shuffle), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    if data.size:
        array[:] = data


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
