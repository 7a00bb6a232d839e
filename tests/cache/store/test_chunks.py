from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import obstore
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from obstore.store import MemoryStore, S3Store
from zarr.codecs import BloscCodec, Crc32cCodec

from potstill.cache.errors import CorruptSegment, InvalidInput, StoreError
from potstill.cache.store.chunks import (
    ChunkCache,
    ReadRequest,
    TiledArray,
    chunk_checksums,
    read_together,
)
from potstill.cache.store.pipelines import codec_pipeline, open_array, zarr_store

PIPELINES = ("stock", "zarrs")
"""The second reads 16 chunks or more; fewer are read alike with both."""


@pytest.fixture(autouse=True)
def needs_zarrs(request: pytest.FixtureRequest) -> None:
    if "zarrs" in getattr(getattr(request.node, "callspec", None), "params", {}).values():
        pytest.importorskip("zarrs")


def store_array(store: Any, data: NDArray[Any], chunk: tuple[int, ...], shard: tuple[int, ...] | None = None) -> None:
    """`data` at `group/values`, cut and compressed as a cache is."""
    whole = tuple(-(-max(size, 1) // step) * step for size, step in zip(data.shape, chunk, strict=True))
    array = zarr.create_array(
        zarr_store(store),
        name="group/values",
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunk,
        shards=shard or whole,
        compressors=[BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    if data.size:
        array[...] = data


def tiled(
    store: Any, sums: NDArray[np.uint32] | None, pipeline: str = "stock", cache: ChunkCache | None = None
) -> TiledArray:
    path = "group/values/zarr.json"
    metadata = (store / path).read_bytes() if isinstance(store, Path) else bytes(obstore.get(store, path).bytes())
    array = open_array(store, "group/values", metadata, pipeline)
    return TiledArray(array, "group/values", sums, ChunkCache(1 << 20) if cache is None else cache, "key")


def some_ids(positions: int = 1000, k: int = 12) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 900, (positions, k), dtype=np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays")
    store_array(path, some_ids(), (64, 5))
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ranges_read_together_are_numpy_slices(folder: Path, pipeline: str, data: st.DataObject) -> None:
    ids = some_ids()
    cache = ChunkCache(data.draw(st.sampled_from([0, 4000, 1 << 20])))
    array = tiled(folder, chunk_checksums(ids, (64, 5)), pipeline, cache)
    point = st.integers(0, len(ids))
    span = st.tuples(point, point, st.sampled_from([None, 1, 5, 6, 12, 99]))
    for asked in data.draw(st.lists(st.lists(span, min_size=1, max_size=5), min_size=1, max_size=3)):
        requests = [ReadRequest(array, min(a, b), max(a, b), columns) for a, b, columns in asked]
        for request, block in zip(requests, read_together(requests), strict=True):
            expected = ids[request.start : request.stop, : request.columns]
            assert block.dtype == ids.dtype
            assert np.array_equal(block, expected)
    assert cache.num_bytes <= cache.max_bytes


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("dtype", ["uint8", "uint32", "float16", "float32", "int64"])
def test_a_flat_array_of_many_objects_is_read(tmp_path: Path, pipeline: str, dtype: str) -> None:
    values = np.arange(1000).astype(dtype)
    store_array(tmp_path, values, (32,), (128,))
    array = tiled(tmp_path, chunk_checksums(values, (32,)), pipeline)
    assert np.array_equal(array.read(100, 700), values[100:700])
    assert np.array_equal(array.read(0, 1000), values)
    assert array.read(990, 1000).tobytes() == values[990:].tobytes()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (7, 0)])
def test_an_array_without_elements_has_no_chunks_to_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.zeros(shape, np.uint8)
    chunk = (8, 4)[: len(shape)]
    store_array(tmp_path, values, chunk)
    array = tiled(tmp_path, chunk_checksums(values, chunk))
    assert array.read(0, shape[0]).shape == shape


def test_a_checksum_is_of_the_chunks_own_elements() -> None:
    values = np.arange(15, dtype=np.uint16).reshape(5, 3)
    sums = chunk_checksums(values, (4, 2))
    parts = (values[:4, :2], values[:4, 2:], values[4:, :2], values[4:, 2:])
    assert sums.tolist() == [google_crc32c.value(part.astype("<u2").tobytes()) for part in parts]
    assert chunk_checksums(values.astype(">u2"), (4, 2)).tolist() == sums.tolist()
    assert chunk_checksums(np.asfortranarray(values), (4, 2)).tolist() == sums.tolist()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_another_valid_chunk_in_its_place_is_found_and_named(tmp_path: Path, pipeline: str) -> None:
    ids = some_ids()
    swapped = ids.copy()
    swapped[64:128], swapped[128:192] = ids[128:192], ids[64:128]
    store_array(tmp_path, swapped, (64, 12))
    array = tiled(tmp_path, chunk_checksums(ids, (64, 12)), pipeline)
    assert np.array_equal(array.read(0, 60), ids[:60])
    with pytest.raises(CorruptSegment, match=r"group/values chunk \(1, 0\) is not what was committed"):
        array.read(60, 70)
    with pytest.raises(CorruptSegment, match=r"chunk \(2, 0\)"):
        array.read(140, 150)
    with pytest.raises(CorruptSegment, match=r"chunk \(1, 0\)"):
        array.read(0, 1000)


def test_checksums_of_another_number_of_chunks_are_refused(folder: Path) -> None:
    with pytest.raises(CorruptSegment, match="has 48 chunks, 3 checksums were recorded"):
        tiled(folder, np.zeros(3, np.uint32))


def damage_byte(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 4]) + data[201:]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    "damage",
    [damage_byte, lambda data: data[:-3], lambda data: data[:300], lambda data: data[:1], lambda _: b""],
    ids=["flipped bit", "cut by three bytes", "cut in a chunk", "one byte", "empty"],
)
def test_a_damaged_object_is_an_error_that_names_it(
    tmp_path: Path, pipeline: str, damage: Callable[[bytes], bytes]
) -> None:
    ids = some_ids()
    store_array(tmp_path, ids, (64, 12))
    path = tmp_path / "group/values/c/0/0"
    path.write_bytes(damage(path.read_bytes()))
    for sums in (None, chunk_checksums(ids, (64, 12))):
        for stop in (70, 1000):
            with pytest.raises(CorruptSegment, match="group/values"):
                tiled(tmp_path, sums, pipeline).read(0, stop)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_flipped_bit_is_found_with_and_without_recorded_checksums(tmp_path: Path, pipeline: str) -> None:
    ids = some_ids(200)
    store_array(tmp_path, ids, (12, 12))
    path = tmp_path / "group/values/c/0/0"
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    for round_ in range(100):
        at = int(rng.integers(len(good)))
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << int(rng.integers(8)))]) + good[at + 1 :])
        array = tiled(tmp_path, chunk_checksums(ids, (12, 12)) if round_ % 2 else None, pipeline)
        with pytest.raises(CorruptSegment):
            array.read(0, 200)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_missing_object_is_not_read_as_zeros(tmp_path: Path, pipeline: str) -> None:
    store_array(tmp_path, np.zeros(100, np.uint8), (5,))
    array = tiled(tmp_path, None, pipeline)
    (tmp_path / "group/values/c/0").unlink()
    for stop in (50, 100):
        with pytest.raises(CorruptSegment, match=r"group/values/c/0 is missing"):
            array.read(0, stop)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("stop", [10, 64, 1024])
def test_a_chunk_that_would_decode_to_more_than_its_size_is_never_decoded(
    tmp_path: Path, pipeline: str, stop: int
) -> None:
    store_array(tmp_path, np.zeros(1024, np.uint8), (64,))
    bomb = numcodecs.blosc.compress(np.zeros(64 << 20, np.uint8), b"zstd", 5, 2)
    bomb += google_crc32c.value(bomb).to_bytes(4, "little")
    index = np.array([0, len(bomb)] * 16, "<u8").tobytes()
    (tmp_path / "group/values/c/0").write_bytes(bomb + index + google_crc32c.value(index).to_bytes(4, "little"))
    array = tiled(tmp_path, None, pipeline)
    with pytest.raises(CorruptSegment, match="would decode to 67108864 bytes instead of 64"):
        array.read(0, stop)


def test_a_store_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    store_array(tmp_path, some_ids(), (64, 12))
    nobody = S3Store(
        "bucket",
        endpoint="http://127.0.0.1:9",
        region="nowhere",
        skip_signature=True,
        client_options={"allow_http": True, "connect_timeout": "1s"},
        retry_config={"max_retries": 0},
    )
    array = open_array(nobody, "group/values", (tmp_path / "group/values/zarr.json").read_bytes(), "stock")
    with pytest.raises(StoreError, match="group/values/c/0/0"):
        TiledArray(array, "group/values", None, ChunkCache(1 << 20), "key").read(0, 3)


def test_any_store_is_read_with_any_pipeline() -> None:
    store = MemoryStore()
    ids = some_ids()
    store_array(store, ids, (64, 5))
    for pipeline in PIPELINES:
        assert np.array_equal(tiled(store, chunk_checksums(ids, (64, 5)), pipeline).read(3, 700, 6), ids[3:700, :6])


def test_small_rows_in_order_decode_no_chunk_twice(folder: Path) -> None:
    cache = ChunkCache(64 * 5 * 2 * 3)
    array = tiled(folder, None, cache=cache)
    for start in range(0, 1000, 10):
        array.read(start, min(start + 10, 1000), 5)
    # One look-up a chunk touched; each of the 16 chunks is missed once.
    assert cache.misses == 16


def test_a_scan_keeps_no_chunk_it_used_whole(folder: Path) -> None:
    cache = ChunkCache(1 << 20)
    array = tiled(folder, None, cache=cache)
    array.read(0, 1000)
    assert cache.num_bytes == 0
    array.read(64, 130)
    assert cache.num_bytes == 64 * 12 * 2


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache = ChunkCache(30)
    for key in range(3):
        cache.put(key, np.zeros(10, np.uint8))
    assert cache.get(0) is not None
    cache.put(3, np.zeros(10, np.uint8))
    assert [cache.get(key) is not None for key in range(4)] == [True, False, True, True]
    cache.put(4, np.zeros(31, np.uint8))
    assert cache.get(4) is None
    assert (cache.num_bytes, cache.hits, cache.misses) == (30, 4, 2)
    cache.put(3, np.zeros(30, np.uint8))
    assert cache.num_bytes == 30
    assert cache.get(0) is None


def test_a_kept_chunk_cannot_be_changed_by_who_reads_it(folder: Path) -> None:
    array = tiled(folder, None)
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            array.read(0, 10, 5)[0, 0] = 7


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_threads_that_share_a_small_cache_read_right_numbers(folder: Path, pipeline: str) -> None:
    ids = some_ids()
    array = tiled(folder, chunk_checksums(ids, (64, 5)), pipeline, ChunkCache(3000))
    wrong: list[int] = []

    def reads(seed: int) -> None:
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, 600, 40).tolist()
        wrong.extend(at for at in starts if not np.array_equal(array.read(at, at + 400), ids[at : at + 400]))

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_opening_leaves_zarr_as_it_was_for_others(folder: Path, pipeline: str) -> None:
    before = (zarr.config.get("codec_pipeline"), zarr.config.get("codecs"))
    tiled(folder, None, pipeline).read(0, 1000)
    assert (zarr.config.get("codec_pipeline"), zarr.config.get("codecs")) == before
    plain = zarr.open_array(zarr_store(folder, read_only=True), path="group/values", mode="r")
    assert np.array_equal(plain[:], some_ids())


def test_the_pipeline_can_be_forced_and_an_unknown_one_is_refused() -> None:
    assert codec_pipeline("stock") == "stock"
    assert codec_pipeline() in PIPELINES
    with pytest.raises(InvalidInput, match="'fast' is unknown; known are stock, zarrs"):
        codec_pipeline("fast")
