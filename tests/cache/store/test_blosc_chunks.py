from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import obstore.store
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from potstill.cache.errors import CorruptSegment
from potstill.cache.store import pipelines
from potstill.cache.store.blosc_chunks import BloscChunks, Place, blosc_chunks, fetch
from potstill.cache.store.object_ranges import side_by_side

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


def chunks_of(store: Any) -> BloscChunks:
    path = "group/values/zarr.json"
    metadata = (store / path).read_bytes() if isinstance(store, Path) else bytes(obstore.get(store, path).bytes())
    chunks = blosc_chunks(pipelines.open_array(store, "group/values", metadata, "stock"))
    assert chunks is not None
    return chunks


def rows(*those: int) -> list[Place]:
    return [(row, 0) for row in those]


def test_chunks_that_adjoin_come_by_one_request_and_the_index_of_an_object_once(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Counting(obstore.store.LocalStore):
        __module__ = "obstore.store"  # by which zarr knows one

        def get(self, path: str, **kwargs: Any) -> Any:
            asked.append(kwargs["options"])
            return super().get(path, **kwargs)

        def get_ranges(self, path: str, *, starts: Sequence[int], **kwargs: Any) -> Any:
            asked.append(len(starts))
            return super().get_ranges(path, starts=starts, **kwargs)

    array_in(tmp_path, empty=False)
    chunks = chunks_of(Counting(tmp_path))
    for _ in range(2):
        stored = fetch({chunks: rows(*range(3, 30), *range(40, 47))})[chunks]
        np.testing.assert_array_equal(chunks.decoded(3, 30, 1, stored), IDS[3 * 64 : 30 * 64])
        np.testing.assert_array_equal(chunks.decoded(40, 47, 1, stored), IDS[40 * 64 :])
    assert asked == [{"range": {"suffix": 47 * 16 + 4}}, 2, 2]


def test_a_chunk_that_the_index_lacks_is_damage(tmp_path: Path) -> None:
    array_in(tmp_path, empty=True)
    assert NOT_THERE in (tmp_path / "group/values/c/0/0").read_bytes()
    with pytest.raises(CorruptSegment, match="group/values/c/0/0 cannot be read: a chunk is missing or cut short"):
        fetch({chunks_of(tmp_path): rows(0, 1)})


@pytest.mark.parametrize("in_folder", [True, False])
def test_an_object_that_is_missing_or_cut_short_is_damage(tmp_path: Path, in_folder: bool) -> None:
    array_in(tmp_path, empty=False)
    store, path = tmp_path if in_folder else obstore.store.LocalStore(tmp_path), tmp_path / "group/values/c/0/0"
    known = chunks_of(store)
    fetch({known: rows(0)})
    path.write_bytes(path.read_bytes()[:500])
    for chunks in (known, chunks_of(store)):
        with pytest.raises(CorruptSegment, match="group/values/c/0/0 is cut short: a chunk lies beyond its end"):
            fetch({chunks: rows(0, 40)})
    path.unlink()
    for chunks in (known, chunks_of(store)):
        with pytest.raises(CorruptSegment, match="group/values/c/0/0 is missing"):
            fetch({chunks: rows(0)})


def test_a_chunk_that_is_said_to_be_larger_than_memory_is_damage(tmp_path: Path) -> None:
    array_in(tmp_path, empty=False)
    path = tmp_path / "group/values/c/0/0"
    stored = path.read_bytes()
    index = np.frombuffer(stored[-47 * 16 - 4 : -4], "<u8").copy()
    index[1] = 1 << 61
    lies = stored[: -47 * 16 - 4] + index.tobytes()
    path.write_bytes(lies + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(CorruptSegment, match="is cut short: a chunk lies beyond its end"):
        fetch({chunks_of(tmp_path): rows(0)})


def test_no_read_of_a_store_keeps_a_process_from_ending_or_from_seeing_ctrl_c() -> None:
    threads = side_by_side([threading.current_thread] * 3)
    assert len(threads) == 3
    assert all(thread.daemon for thread in threads), "as the main thread is not"


def test_what_a_read_raises_comes_to_who_asked_when_all_have_ended() -> None:
    ended: list[int] = []

    def read(number: int) -> int:
        ended.append(number)
        if number in (1, 2):
            raise CorruptSegment(f"segment {number}")
        return number

    with pytest.raises(CorruptSegment, match="segment 1"):
        side_by_side([partial(read, number) for number in range(4)])
    assert sorted(ended) == [0, 1, 2, 3]
    assert side_by_side([partial(read, number) for number in (5, 3)]) == [5, 3]
    assert side_by_side([]) == []


def test_a_chunk_that_is_shorter_than_its_header_says_is_refused_before_it_is_read(tmp_path: Path) -> None:
    array_in(tmp_path, empty=False)
    chunks = chunks_of(tmp_path)
    stored = fetch({chunks: rows(0)})[chunks][0, 0]
    short = stored[:100].tobytes()
    with_crc = np.frombuffer(short + google_crc32c.value(short).to_bytes(4, "little"), np.uint8)
    with pytest.raises(CorruptSegment, match=f"a chunk has 100 bytes, but its header says {len(stored) - 4}"):
        chunks.decoded(0, 1, 1, {(0, 0): with_crc})


def test_an_array_of_another_layout_is_left_to_zarr(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path), name="group/values", shape=(1000,), dtype="uint16", chunks=(100,))
    metadata = (tmp_path / "group/values/zarr.json").read_bytes()
    assert blosc_chunks(pipelines.open_array(tmp_path, "group/values", metadata, "stock")) is None
