from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from potstill.cache.errors import CorruptSegment
from potstill.cache.store import pipelines
from potstill.cache.store.blosc_chunks import BloscChunks, blosc_chunks

IDS = np.random.default_rng(0).integers(0, 900, (3000, 5), dtype=np.uint16)
NOT_THERE = b"\xff" * 16


def array_in(folder: Path, *, empty: bool) -> None:
    """An array of chunks of 64 rows in one object; with `empty`, only the first of them."""
    array = zarr.create_array(
        LocalStore(folder),
        name="group/values",
        shape=IDS.shape,
        dtype=IDS.dtype,
        chunks=(64, 5),
        shards=(3008, 5),
        compressors=[BloscCodec(), Crc32cCodec()],
        config={"write_empty_chunks": not empty},
    )
    stop = 64 if empty else len(IDS)
    array[:stop] = IDS[:stop]


def chunks_of(folder: Path) -> BloscChunks:
    chunks = blosc_chunks(pipelines.open_array(folder, "group/values", "stock"))
    assert chunks is not None
    return chunks


def test_neighbouring_chunks_come_in_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Counting(LocalStore):
        async def get(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(args[2])
            return await super().get(*args, **kwargs)

    array_in(tmp_path, empty=False)
    monkeypatch.setattr(pipelines, "LocalStore", Counting)
    chunks = chunks_of(tmp_path)
    asked.clear()
    stored = asyncio.run(chunks.fetch(3, 47, 1))
    index, together = asked
    assert isinstance(index, SuffixByteRequest)
    assert together.end - together.start == sum(map(len, stored))
    np.testing.assert_array_equal(chunks.decoded(3, 1, stored), IDS[3 * 64 :])


def test_a_chunk_that_the_index_lacks_is_damage(tmp_path: Path) -> None:
    array_in(tmp_path, empty=True)
    assert NOT_THERE in (tmp_path / "group/values/c/0/0").read_bytes()
    with pytest.raises(CorruptSegment, match="group/values/c/0/0 cannot be read: a chunk is missing or cut short"):
        asyncio.run(chunks_of(tmp_path).fetch(0, 2, 1))


def test_a_chunk_that_is_shorter_than_its_header_says_is_refused_before_it_is_read(tmp_path: Path) -> None:
    array_in(tmp_path, empty=False)
    chunks = chunks_of(tmp_path)
    (stored,) = asyncio.run(chunks.fetch(0, 1, 1))
    short = stored[:100].tobytes()
    with_crc = np.frombuffer(short + google_crc32c.value(short).to_bytes(4, "little"), np.uint8)
    with pytest.raises(CorruptSegment, match=f"a chunk has 100 bytes, but its header says {len(stored) - 4}"):
        chunks.decoded(0, 1, [with_crc])


def test_an_array_of_another_layout_is_left_to_zarr(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path), name="group/values", shape=(1000,), dtype="uint16", chunks=(100,))
    assert blosc_chunks(pipelines.open_array(tmp_path, "group/values", "stock")) is None
