from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from potstill.cache.corpus.keys import (
    KEY_BYTES,
    KEY_ORDER,
    SORTED_KEYS,
    KeyIndex,
    KeysInMemory,
    first_places,
    key_records,
    row_key,
    row_keys,
    sort_file,
    sort_records,
    write_key_index,
)
from potstill.cache.errors import CorruptSegment, InvalidInput
from potstill.cache.store.groups import GroupReader, GroupWriter
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.root import Root

ANY_KEY = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
# Crowded: few values, at the ends of the range and differing late.
CROWDED = st.tuples(st.sampled_from(b"\x00\x01\x80\xff"), st.sampled_from(b"\x00\x07\xff")).map(
    lambda ends: bytes([ends[0]]) * 15 + bytes([ends[1]])
)
KEYS = st.lists(ANY_KEY | CROWDED, min_size=1, max_size=60)


def as_array(keys: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def hashes(count: int) -> list[bytes]:
    return [hashlib.blake2b(i.to_bytes(8, "little"), digest_size=KEY_BYTES).digest() for i in range(count)]


def first_rows(keys: list[bytes]) -> dict[bytes, int]:
    rows: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, row)
    return rows


def stored_index(root: Root, keys: list[bytes]) -> KeyIndex:
    writer = GroupWriter(root, "g")
    repeated = write_key_index(writer, sort_records(key_records(as_array(keys))))
    assert repeated == len(keys) - len(set(keys))
    return KeyIndex(GroupReader(root, "g", writer.finish()), len(keys))


def test_a_key_is_of_the_tokenizer_and_the_ids() -> None:
    row = np.array([5, 6, 7], dtype=np.uint32)
    expected = hashlib.blake2b(bytes.fromhex("ab" * 32) + row.astype("<u4").tobytes(), digest_size=16).digest()
    assert row_key("ab" * 32, row) == expected
    assert row_key("ac" * 32, row) != expected
    many = row_keys("ab" * 32, np.array([9, 5, 6, 7], dtype=np.uint32), [0, 1, 4])
    assert many[1].tobytes() == expected


@given(keys=KEYS)
def test_a_file_of_keys_is_sorted_in_place_and_leaves_no_other(keys: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        path.write_bytes(key_records(as_array(keys)).tobytes())
        found = [(record["key"].tobytes(), int(record["row"])) for record in sort_file(path)]
        assert [p.name for p in Path(folder).iterdir()] == ["keys"]
    assert found == sorted((key, row) for row, key in enumerate(keys))


@given(keys=KEYS, others=st.lists(ANY_KEY | CROWDED, max_size=20), page=st.integers(1, 9))
def test_places_are_found_as_a_dict_finds_them_whatever_the_pages(
    keys: list[bytes], others: list[bytes], page: int
) -> None:
    ordered = sorted(keys)
    pages_read: list[int] = []

    def read(numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
        for number in numbers.tolist():
            pages_read.append(number)
            yield number, np.array(ordered[number * page : (number + 1) * page], dtype="S16")

    wanted = np.unique(np.array(keys + others, dtype="S16"))
    places = first_places(wanted, len(ordered), page, read)
    as_bytes = [bytes(key).ljust(16, b"\0") for key in wanted.tolist()]
    assert places.tolist() == [ordered.index(key) if key in ordered else -1 for key in as_bytes]
    assert set(pages_read) <= set(range(-(-len(ordered) // page)))


@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 200), page=st.integers(1, 9))
def test_a_search_of_nonsense_ends(seed: int, num_rows: int, page: int) -> None:
    random = np.random.default_rng(seed)
    rounds = []

    def read(numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
        rounds.append(len(numbers))
        for number in numbers.tolist():
            count = min(page, num_rows - number * page)
            yield number, np.frombuffer(random.bytes(16 * count), dtype="S16")

    wanted = np.unique(np.frombuffer(random.bytes(160), dtype="S16"))
    places = first_places(wanted, num_rows, page, read)
    assert ((places >= -1) & (places < num_rows)).all()
    assert len(rounds) <= 4 + 1 + np.ceil(np.log2(num_rows))


def test_keys_over_many_pages_are_found_in_a_stored_group(tmp_path: Path) -> None:
    keys = hashes(20_000)
    keys += keys[:9] + [b"\x00" * 16] * 9000 + [b"\xff" * 16]
    index = stored_index(Root.open(tmp_path), keys)
    rows = first_rows(keys)
    misses = [hashlib.sha256(key).digest()[:16] for key in keys[:50]]
    assert index.find(keys[::-7] + misses) == [rows[key] for key in keys[::-7]] + [None] * 50
    assert index.find([b"\x00" * 16]) == [20_009]
    assert index.find([]) == []


@pytest.mark.parametrize("count", [1, 2, 4096, 4097])
def test_sizes_around_a_page_agree_with_keys_in_memory(tmp_path: Path, count: int) -> None:
    keys = hashes(count)
    records = sort_records(key_records(as_array(keys)))
    wanted = [*keys[:3], *keys[-3:], b"\x00" * 16, b"\xff" * 16]
    held = KeysInMemory(as_array(keys), records["row"])
    assert stored_index(Root.open(tmp_path), keys).find(wanted) == held.find(wanted)


def test_a_key_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a row key has 16 bytes, not 15"):
        stored_index(Root.open(tmp_path), hashes(3)).find([b"x" * 15])


@pytest.mark.parametrize(
    ("keys", "order", "message"),
    [
        (hashes(3), [0, 1, 2], "sorted_keys does not rise from 0 on"),
        (sorted(hashes(3)), [0, 1, 3], "key_order names rows outside 0 to 3"),
        (sorted(hashes(3)), [0, -1, 2], "key_order names rows outside 0 to 3"),
    ],
)
def test_an_index_that_no_writer_makes_is_an_error(
    tmp_path: Path, keys: list[bytes], order: list[int], message: str
) -> None:
    assert hashes(3) != sorted(hashes(3))
    root = Root.open(tmp_path)
    writer = GroupWriter(root, "g")
    writer.write(SORTED_KEYS, as_array(keys), Layout((8192, 16)))
    writer.write(KEY_ORDER, np.array(order, dtype=np.int64), Layout((8192,)))
    reader = GroupReader(root, "g", writer.finish())
    with pytest.raises(CorruptSegment, match=message):
        KeyIndex(reader, 3).find(keys)
    with pytest.raises(CorruptSegment, match="its commit means uint8"):
        KeyIndex(reader, 4)
