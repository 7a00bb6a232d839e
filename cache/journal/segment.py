"""Segments of the journal: rows with their tokens, keys and stored targets, and the record that publishes them.

    journal/<process>/<teacher>-<n>/       tokens row_starts sorted_keys key_order, and the arrays of `targets.segment`
    journal/<process>/<teacher>-<n>.json   its record, created last

Rows lie in the order in which they came in, because rows that are asked for together are asked for together again;
sorted keys beside them find a row on disk. Ids are stored as they are, not as ranks, so that segments can be joined
without decoding. Segments of format 1 have `row_keys` instead of sorted keys, which takes 24 bytes a row in memory.

Shape legend:  R rows, P positions, K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import KeyIndex
from potstill.cache.corpus.keys import (
    KEY_BYTES,
    KEY_ORDER,
    SORTED_KEYS,
    KeysInMemory,
    key_records,
    sort_records,
    write_key_index as write_sorted_keys,
)
from potstill.cache.encoding import Encoding, RankTable, decode, encode
from potstill.cache.encoding.logprobs import Measured, StoredArrays, encoding_by_name
from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.store import GroupReader, GroupWriter, Reading, Root, StoredObject
from potstill.cache.store.chunks import read_together
from potstill.cache.store.groups import CHECKSUMS, objects_from_json, removed_on_failure
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.publishing import publish as publish_group
from potstill.cache.store.record import Record, read_record, record_bytes, values_read
from potstill.cache.targets.packed import Text
from potstill.cache.targets.segment import SegmentRange, SegmentReader, read_segment_ranges, write_arrays
from potstill.cache.types import Fields, Provenance, Targets, TeacherIdentity, Tokens

TOKENS = "tokens"
ROW_STARTS = "row_starts"
TOKEN_LAYOUT = Layout((1 << 16,))
STARTS_LAYOUT = Layout((1 << 12,))
_ROW_KEYS = "row_keys"


@dataclass(frozen=True, slots=True)
class JournalRow:
    """One row to keep, already encoded: a later hit decodes the same bytes that its first answer was decoded from."""

    key: bytes
    tokens: Tokens
    k: int
    stored: StoredArrays
    """Stored arrays, in which every id is its own rank (`RankTable.plain`)."""
    measured: Measured
    """The encoding error of its positions."""

    @classmethod
    def of(
        cls, key: bytes, tokens: Tokens, exact: Targets, encoding: Encoding, ranks: RankTable
    ) -> tuple[JournalRow, Targets]:
        """Encode a teacher's answer; returns the row to keep, and the targets that it decodes to, now and later.

        Raises:
            TeacherFailed: the answer is impossible (`potstill.cache.encoding.logprobs.check_targets`).
        """
        stored = encode(exact, encoding, ranks)
        answer = decode(stored, encoding, ranks)
        measured = Measured()
        measured.add(exact, answer)
        return cls(key, tokens, exact.k, stored, measured), answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """Content of the record of one journal segment."""

    path: str
    """Path of the group; the record's path has `.json` behind it."""
    teacher: str
    identity: TeacherIdentity
    k: int
    encoding: Encoding
    num_rows: int
    num_positions: int
    since: float
    """Time at which its oldest row was sealed, in seconds since 1970 by the store's clock; 0 in format 1.

    It is later than that of every segment that its writer knew, whatever a clock said.

    Where several segments hold a row with the same K, the lowest `since` is used, also after they are joined."""
    sealed: float
    """Time at which its newest row was sealed; the segment with the lowest is evicted first."""
    error: Mapping[str, float]
    """Error measured when the rows were encoded (`EncodingError`); in format 1 the encoding's bound."""
    provenance: Provenance
    objects: tuple[StoredObject, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Stored size of the segment."""
        return sum(item.size for item in self.objects)

    @property
    def order(self) -> tuple[float, str]:
        """Sort key of segments with the same K: the lowest is asked first."""
        return self.since, self.path

    def to_bytes(self) -> bytes:
        """Bytes of the record as it is stored."""
        record: Record = {
            "path": self.path,
            "teacher": self.teacher,
            "identity": self.identity,
            "k": self.k,
            "encoding": self.encoding.name,
            "rows": self.num_rows,
            "positions": self.num_positions,
            "since": self.since,
            "sealed": self.sealed,
            "error": dict(self.error),
            "provenance": self.provenance,
            "objects": self.objects,
        }
        return record_bytes("journal", record)

    @classmethod
    def read(cls, root: Root, path: str) -> SegmentRecord | None:
        """Read the record of the group at `path`; None when there is none.

        Raises:
            FormatError: it is no journal record. CorruptSegment: it is damaged, or belongs to another segment.
        """
        record = read_record(root, f"{path}.json", "journal")
        if record is None:
            return None
        with values_read(f"{path}.json is not a journal record"):
            encoding = encoding_by_name(record["encoding"])
            found = cls(
                path=str(record.get("path", path)),
                teacher=str(record["teacher"]),
                identity=TeacherIdentity.from_json(record["identity"]),
                k=int(record["k"]),
                encoding=encoding,
                num_rows=int(record["rows"]),
                num_positions=int(record["positions"]),
                since=float(record.get("since", 0.0)),
                sealed=float(record.get("sealed", 0.0)),
                error=dict(record.get("error", stated_error(encoding))),
                provenance=Provenance.from_json(record["provenance"]),
                objects=objects_from_json(record["objects"]),
            )
        # A record that was copied over another one is intact by its own sha256.
        if found.path != path:
            raise CorruptSegment(f"{path}.json is the record of {found.path}")
        if found.encoding.packed or not (found.k >= 1 and found.num_rows >= 1 and found.num_positions >= 0):
            raise FormatError(f"{path}.json is not a journal record: impossible encoding or counts")
        return found


class JournalSegment:
    """A published segment, opened at the first read; thread-safe.

    Reads raise CorruptSegment or FormatError for bytes that are damaged or were removed, StoreError for a failed store.
    """

    def __init__(self, root: Root, record: SegmentRecord, ranks: RankTable, reading: Reading) -> None:
        self.record = record
        self._root = root
        self._ranks = ranks
        self._reading = reading

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays of the targets."""
        return self._reader.top_k_names()

    def locate(self, keys: Sequence[bytes]) -> list[int | None]:
        """Row number of each key, or None."""
        found = self._index.find(keys)
        self._require_there()
        return found

    def read(self, rows: Sequence[int]) -> list[Targets]:
        """Read the targets of rows, with all kept entries."""
        ranges = [SegmentRange(self._reader, start, stop) for start, stop in self.row_ranges(rows)]
        targets = read_segment_ranges(ranges, Fields(k=self.record.k)) if ranges else []
        self._require_there()
        return targets

    def read_stored(self, rows: Sequence[int]) -> list[StoredArrays]:
        """Read the arrays of rows without decoding them."""
        ranges, names = self.row_ranges(rows), self.names
        arrays = read_together([self._group.request(name, *part) for part in ranges for name in names])
        self._require_there()
        return [dict(zip(names, arrays[i : i + len(names)], strict=True)) for i in range(0, len(arrays), len(names))]

    def array(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read positions `start` to `stop` of `tokens`, or of an array of the targets."""
        block = self._group.read(name, start, stop)
        self._require_there()
        return block

    def row_ranges(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Read the positions at which each row starts and ends."""
        edges = read_together([self._group.request(ROW_STARTS, row, row + 2) for row in rows])
        ranges = [(int(start), int(stop)) for start, stop in edges]
        for row, (start, stop) in zip(rows, ranges, strict=True):
            if not 0 <= start <= stop <= self.record.num_positions:
                raise CorruptSegment(f"{self.record.path}/{ROW_STARTS} does not rise at row {row}")
        return ranges

    def starts(self) -> NDArray[np.int64]:
        """Read [R+1] int64: the position at which each row starts, then P."""
        starts = self._group.read_all(ROW_STARTS).astype(np.int64)
        if starts[0] != 0 or starts[-1] != self.record.num_positions or (np.diff(starts) < 0).any():
            raise CorruptSegment(f"{self.record.path}/{ROW_STARTS} does not rise from 0 to {self.record.num_positions}")
        self._require_there()
        return starts

    def row_keys(self) -> NDArray[np.uint8]:
        """Read the key of each row, [R, 16] uint8."""
        if not self._group.has(SORTED_KEYS):
            found = self._group.read_all(_ROW_KEYS)
            self._require_there()
            return found
        order = self._group.read_all(KEY_ORDER)
        if not np.array_equal(np.sort(order), np.arange(self.record.num_rows)):
            raise CorruptSegment(f"{self.record.path}/{KEY_ORDER} is not an order of {self.record.num_rows} rows")
        keys = np.empty((self.record.num_rows, KEY_BYTES), np.uint8)
        keys[order] = self._group.read_all(SORTED_KEYS)
        return keys

    @cached_property
    def _group(self) -> GroupReader:
        record = self.record
        group = GroupReader(self._root, record.path, record.objects, self._reading)
        group.expect(ROW_STARTS, (record.num_rows + 1,), ("int64",))
        group.expect(TOKENS, (record.num_positions,), ("uint32",))
        if group.has(SORTED_KEYS):
            group.expect(SORTED_KEYS, (record.num_rows, KEY_BYTES), ("uint8",))
            group.expect(KEY_ORDER, (record.num_rows,), ("int64",))
        else:
            group.expect(_ROW_KEYS, (record.num_rows, KEY_BYTES), ("uint8",))
        return group

    @cached_property
    def _reader(self) -> SegmentReader:
        return SegmentReader(
            self._group,
            fields=Fields(k=self.record.k),
            encoding=self.record.encoding,
            ranks=self._ranks,
            text=Text(
                num_positions=self.record.num_positions,
                tokens=lambda start, stop: self._group.read(TOKENS, start, stop),
                row_starts=lambda: self._group.read_all(ROW_STARTS),
            ),
            reading=self._reading,
        )

    @cached_property
    def _index(self) -> KeyIndex | KeysInMemory:
        if self._group.has(SORTED_KEYS):
            return KeyIndex(self._group, self.record.num_rows)
        keys = self._group.read_all(_ROW_KEYS)
        order = sort_records(key_records(keys))["row"]
        return KeysInMemory(keys, order.astype(np.int64))

    def _require_there(self) -> None:
        """Fail if the segment is gone: without checksums (format 1) a missing object reads as zeros."""
        # The record is removed before any object: if it is still there now, the read was whole.
        if not self._group.has(CHECKSUMS) and self._root.get(f"{self.record.path}.json") is None:
            raise CorruptSegment(f"{self.record.path} was removed while it was read")


def publish(
    root: Root,
    record: SegmentRecord,
    write: Callable[[GroupWriter], None],
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> SegmentRecord | None:
    """Write a segment's arrays, then create its record; None when by then it is no longer `wanted`.

    Raises:
        StoreError: the store is full or fails; nothing is left, or a whole segment.
    """
    with removed_on_failure(root, record.path):
        writer = GroupWriter(root, record.path)
        write(writer)
        written = replace(record, objects=writer.finish())
        keep = wanted()
    if not keep:
        root.delete(record.path)
        return None
    # From here on the record may be there, also when `create` raises: the group is not ours to delete.
    created = publish_group(root, f"{record.path}.json", written.to_bytes(), record.path, written.objects)
    assert created, "a process's journal names are its own"
    return written


def write_rows(writer: GroupWriter, rows: Sequence[JournalRow]) -> None:
    """Write the arrays of rows; all have the same K and encoding."""
    keys = np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, KEY_BYTES)
    writer.write(TOKENS, np.concatenate([row.tokens for row in rows]).astype(np.uint32, copy=False), TOKEN_LAYOUT)
    write_row_index(writer, [len(row.tokens) for row in rows], keys)
    write_arrays(writer, joined_arrays([row.stored for row in rows]))


def write_row_index(writer: GroupWriter, lengths: Iterable[int], keys: NDArray[np.uint8]) -> None:
    """Write the starts and sorted keys of rows with `lengths` [R] and `keys` [R, 16]."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.fromiter(lengths, np.int64), dtype=np.int64)])
    writer.write(ROW_STARTS, starts, STARTS_LAYOUT)
    write_sorted_keys(writer, sort_records(key_records(keys)))


def joined_arrays(parts: Sequence[StoredArrays]) -> StoredArrays:
    """Concatenate the stored arrays of all parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measured_error(rows: Iterable[JournalRow]) -> dict[str, float]:
    """Encoding error over all positions of rows, in the form that records keep."""
    total = Measured()
    for row in rows:
        part = row.measured
        for name in ("positions", "entries", "sum_abs", "saturated", "saturated_mass"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        total.max_abs = max(total.max_abs, part.max_abs)
        total.kl += part.kl
    return asdict(total.error())


def stated_error(encoding: Encoding) -> dict[str, float]:
    """Error figures where nothing was measured: the encoding's bound, which also bounds every KL divergence."""
    bounded = dict.fromkeys(("max_abs", "mean_abs", "mean_kl", "p999_kl"), encoding.max_abs_error)
    return {**bounded, "saturated": 0, "saturated_mass": 0.0}


def joined_error(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Join the error figures of parts with so many positions each; `p999_kl`, an upper bound, is the worst part's."""
    positions = max(sum(count for _, count in parts), 1)
    joined = {name: sum(error[name] * count for error, count in parts) / positions for name in parts[0][0]}
    worst = {name: max(error[name] for error, _ in parts) for name in ("max_abs", "p999_kl")}
    return {**joined, **worst, "saturated": sum(error["saturated"] for error, _ in parts)}


def remove_segment(root: Root, record: SegmentRecord) -> None:
    """Remove a segment from the journal: the record first, so that no reader finds a record without its group."""
    root.remove(f"{record.path}.json")
    root.delete(record.path)


def journal_records(root: Root, teacher: str | None = None) -> list[str]:
    """Paths, without `.json`, of the journal records of all processes; with `teacher`, of that one alone."""
    paths = [
        f"journal/{process}/{name.removesuffix('.json')}"
        for process in root.folders("journal")
        for name in root.objects(f"journal/{process}")
        if name.endswith(".json")
    ]
    return [path for path in paths if teacher is None or teacher_of(path) == teacher]


def corrupt_journal_objects(root: Root, path: str) -> list[str]:
    """Read every object of a journal segment; one line for each that is not what its record says."""
    try:
        record = SegmentRecord.read(root, path)
        found = [] if record is None else GroupReader(root, path, record.objects).corrupt_objects()
    except (CorruptSegment, FormatError) as error:
        found = [error.detail]
    # A service may have joined or evicted the segment meanwhile.
    return found if root.get(f"{path}.json") is not None else []


def teacher_of(path: str) -> str:
    """Name of the teacher whose segment has this path."""
    return path.rsplit("/", 1)[-1].rpartition("-")[0]
