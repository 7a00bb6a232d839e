"""Row keys, by which a row is found again: hashing, sorting on disk, and look-up on disk.

    sorted_keys [R, 16] uint8    the keys of all rows, rising; beside a group's `row_keys`
    key_order   [R] int64        the row of each sorted key; of equal keys the earliest row comes first

Keys are hashes, so they are spread evenly, and a key's place is interpolated from its value: a look-up reads a page or
two of `sorted_keys` and one of `key_order`, however many rows there are. Memory does not grow with R.

Shape legend:  R rows, W wanted keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import CorruptSegment, InvalidInput
from potstill.cache.store import GroupReader, GroupWriter
from potstill.cache.store.chunks import read_together
from potstill.cache.store.new_arrays import Layout
from potstill.cache.types import Tokens

KEY_BYTES = 16
SORTED_KEYS = "sorted_keys"
KEY_ORDER = "key_order"

KEY_RECORD = np.dtype([("key", np.uint8, (KEY_BYTES,)), ("row", ">i8")])
"""A key and its row, in the form in which they are sorted: big-endian, so that as bytes they come in order."""

_CHUNK = 8192
# Half a chunk, because the chunk cache keeps only those that a read did not use whole (`store.chunks`).
_PAGE = 4096
# 32 MiB of keys to an object, so that the index of its chunks stays 4 KiB and few are held while writing.
_OBJECT_KEYS = 1 << 21
_PAGES_AT_ONCE = 64
# Interpolation needs one or two. Then bisection, which also ends for keys that are damaged or mostly equal.
_GUESSES = 4


def row_key(tokenizer_sha256: str, row: Tokens) -> bytes:
    """Key of a row, 16 bytes: a hash of its tokenizer and its token ids."""
    return row_keys(tokenizer_sha256, row, [0, len(row)]).tobytes()


def row_keys(tokenizer_sha256: str, tokens: Tokens, starts: Sequence[int]) -> NDArray[np.uint8]:
    """Keys [R, 16] of the rows `tokens[starts[i]:starts[i + 1]]`."""
    begun = hashlib.blake2b(bytes.fromhex(tokenizer_sha256), digest_size=KEY_BYTES)
    data = memoryview(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    digests = []
    for index in range(len(starts) - 1):
        digest = begun.copy()
        digest.update(data[4 * starts[index] : 4 * starts[index + 1]])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)


def key_records(keys: NDArray[np.uint8], first_row: int = 0) -> NDArray[np.void]:
    """Records [R] of `KEY_RECORD` for keys [R, 16] of the rows from `first_row` on."""
    records = np.empty(len(keys), dtype=KEY_RECORD)
    records["key"] = keys
    records["row"] = np.arange(first_row, first_row + len(keys))
    return records


def sort_records(records: NDArray[np.void]) -> NDArray[np.void]:
    """Sort records by key; records of equal keys stay in their order, by row."""
    return records[np.argsort(_comparable(records["key"]), kind="stable")]


def first_of_each_key(keys: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.bool_]]:
    """Mark in each part of keys [R, 16] the rows [R] whose key no row before them has."""
    joined = _comparable(np.concatenate(keys))
    first = np.zeros(len(joined), dtype=bool)
    first[np.unique(joined, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(part) for part in keys[:-1]], dtype=np.int64))


def sort_file(path: Path) -> NDArray[np.void]:
    """Sort the `KEY_RECORD`s of a file where they lie, by key and then by row, and return them [R], mapped to memory.

    The kernel writes pages out when memory is short, so the file may be larger than memory.
    """
    records = np.memmap(path, KEY_RECORD, mode="r+")
    records.view(f"S{KEY_RECORD.itemsize}").sort()
    return records


def write_key_index(writer: GroupWriter, records: NDArray[np.void]) -> int:
    """Write `sorted_keys` and `key_order` of sorted records; returns how many rows have the key of an earlier one."""
    num_rows = len(records)
    size = min(_OBJECT_KEYS, max(num_rows, 1))
    keys = writer.array(SORTED_KEYS, (num_rows, KEY_BYTES), np.uint8, Layout((_CHUNK, KEY_BYTES), size))
    order = writer.array(KEY_ORDER, (num_rows,), np.int64, Layout((_CHUNK,), size))
    repeated, last = 0, np.empty(0, dtype=f"S{KEY_BYTES}")
    for start in range(0, num_rows, size):
        block = records[start : start + size]
        ordered = np.concatenate([last, _comparable(block["key"])])
        repeated += int((ordered[1:] == ordered[:-1]).sum())
        last = ordered[-1:]
        writer.put(keys, start, np.ascontiguousarray(block["key"]))
        writer.put(order, start, block["row"].astype(np.int64))
    return repeated


class KeyIndex:
    """Look-up of a group's rows by key, on disk; thread-safe."""

    def __init__(self, reader: GroupReader, num_rows: int) -> None:
        self._reader = reader
        self._num_rows = num_rows
        reader.expect(SORTED_KEYS, (num_rows, KEY_BYTES), ("uint8",))
        reader.expect(KEY_ORDER, (num_rows,), ("int64",))

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Find the first row with each key, or None; a page that several keys need is read once per round.

        Raises:
            InvalidInput: a key has not 16 bytes. CorruptSegment: stored bytes are damaged.
        """
        wanted, inverse = np.unique(np.frombuffer(_joined(keys), f"S{KEY_BYTES}"), return_inverse=True)
        places = first_places(wanted, self._num_rows, _PAGE, self._sorted_pages)
        rows = self._rows_at(places)[inverse]
        return [None if row < 0 else row for row in rows.tolist()]

    def _rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row [W] at each place of the sorted keys; -1 for the place -1."""
        rows = np.full(len(places), -1, dtype=np.int64)
        found = np.flatnonzero(places >= 0)
        pages = places[found] // _PAGE
        for page, block in self._pages(KEY_ORDER, np.unique(pages)):
            here = found[pages == page]
            rows[here] = block[places[here] - page * _PAGE]
        if (rows >= self._num_rows).any() or (rows[found] < 0).any():
            raise CorruptSegment(f"{self._reader.path}/{KEY_ORDER} names rows outside 0 to {self._num_rows}")
        return rows

    def _sorted_pages(self, pages: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bytes_]]]:
        for page, block in self._pages(SORTED_KEYS, pages):
            keys = _comparable(block)
            if (keys[1:] < keys[:-1]).any():
                raise CorruptSegment(f"{self._reader.path}/{SORTED_KEYS} does not rise from {page * _PAGE} on")
            yield page, keys

    def _pages(self, name: str, pages: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, len(pages), _PAGES_AT_ONCE):
            some = pages[start : start + _PAGES_AT_ONCE].tolist()
            ends = [min((page + 1) * _PAGE, self._num_rows) for page in some]
            requests = [self._reader.request(name, page * _PAGE, end) for page, end in zip(some, ends, strict=True)]
            yield from zip(some, read_together(requests), strict=True)


class KeysInMemory:
    """Look-up of rows by key where no sorted keys were stored, as in format 1; holds 24 bytes a row."""

    def __init__(self, keys: NDArray[np.uint8], order: NDArray[np.int64]) -> None:
        self._order = order
        self._sorted = _comparable(keys)[order]

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Find rows as `KeyIndex.find` does."""
        wanted = np.frombuffer(_joined(keys), f"S{KEY_BYTES}")
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        hits = (self._sorted[places] == wanted).tolist()
        return [row if hit else None for row, hit in zip(self._order[places].tolist(), hits, strict=True)]


def first_places(
    wanted: NDArray[np.bytes_],
    num_rows: int,
    page: int,
    read: Callable[[NDArray[np.int64]], Iterator[tuple[int, NDArray[np.bytes_]]]],
) -> NDArray[np.int64]:
    """Find the place [W] of each wanted key among R sorted keys, the first of equal ones; -1 for a key not there.

    `read` gives pages of `page` sorted keys by their numbers. Places are interpolated between known keys, after some
    rounds bisected. Every page that is read narrows the range, so that the search ends whatever the pages hold.
    """
    search = _Search(wanted, num_rows)
    tries = 0
    while len(left := search.left()):
        pages = search.guesses(left, halve=tries >= _GUESSES) // page
        for number, keys in read(np.unique(pages)):
            search.narrow(left[pages == number], number * page, keys)
        tries += 1
    return search.places


class _Search:
    """State of `first_places`: for each wanted key the range it can be in, and the leading bytes at both ends."""

    def __init__(self, wanted: NDArray[np.bytes_], num_rows: int) -> None:
        self._wanted = wanted
        self._values = _leading(wanted)
        self._low = np.zeros(len(wanted), dtype=np.int64)
        self._high = np.full(len(wanted), num_rows, dtype=np.int64)
        self._low_value = np.zeros(len(wanted), dtype=np.float64)
        self._high_value = np.full(len(wanted), 2.0**64)
        self.places = np.full(len(wanted), -1, dtype=np.int64)

    def left(self) -> NDArray[np.int64]:
        """Indices of the wanted keys whose place is still open."""
        return np.flatnonzero(self._low < self._high)

    def guesses(self, left: NDArray[np.int64], *, halve: bool) -> NDArray[np.int64]:
        """Guess a place inside the range of each open key."""
        low, high = self._low[left], self._high[left]
        width = self._high_value[left] - self._low_value[left]
        share = np.full(len(left), 0.5)
        if not halve:
            np.divide(self._values[left] - self._low_value[left], width, out=share, where=width > 0)
        guess: NDArray[np.int64] = low + (np.clip(share, 0.0, 1.0) * (high - low)).astype(np.int64)
        return np.asarray(np.minimum(guess, high - 1), dtype=np.int64)

    def narrow(self, some: NDArray[np.int64], first: int, keys: NDArray[np.bytes_]) -> None:
        """Narrow the ranges of `some` wanted keys by the sorted `keys` at places from `first` on."""
        at = np.searchsorted(keys, self._wanted[some])
        hit = keys[np.minimum(at, len(keys) - 1)] == self._wanted[some]
        self.places[some[hit]] = first + at[hit]
        # at == 0 also for a key equal to the page's first one: an earlier equal one may end the page before.
        below, above = some[at == 0], some[at == len(keys)]
        inside = some[(at > 0) & (at < len(keys))]
        self._high[below], self._high_value[below] = first, _leading(keys[:1])[0]
        self._low[above], self._low_value[above] = first + len(keys), _leading(keys[-1:])[0]
        self._low[inside] = self._high[inside]


def _comparable(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """View keys [R, 16] as [R] strings of 16 bytes, which numpy can compare and sort."""
    return np.ascontiguousarray(keys).reshape(-1).view(f"S{KEY_BYTES}")


def _leading(keys: NDArray[np.bytes_]) -> NDArray[np.float64]:
    """The first eight bytes of each key as a number below 2^64; float64, as only a guess is made of it."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)[:, 0].astype(np.float64)


def _joined(keys: Sequence[bytes]) -> bytes:
    wrong = next((key for key in keys if len(key) != KEY_BYTES), None)
    if wrong is not None:
        raise InvalidInput(f"a row key has {KEY_BYTES} bytes, not {len(wrong)}; make it with `corpus.keys.row_key`")
    return b"".join(keys)
