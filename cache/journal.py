"""What a service keeps of rows that were asked for over HTTP and belong to no corpus.

    journal/<process>/<teacher>-<n>/       a segment with its own tokens, row starts and row keys
    journal/<process>/<teacher>-<n>.json   its record, created last: identity, fields, encoding, objects

Every process writes below a name of its own, so no two writers share an object. Rows are held in memory until a
segment is worth writing or has waited long enough; a crash loses those rows' work, never anything's truth.

The index of keys is in memory: about 150 bytes a row.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.corpus import KEY_BYTES
from cache.encoding import RankTable, StoredArrays, encode, encoding_by_name
from cache.errors import CorruptSegment, FormatError, InvalidInput, PotstillError
from cache.groups import GroupReader, GroupWriter, Layout, objects_from_json, objects_to_json
from cache.record import read_record, record_bytes
from cache.segment import SegmentReader, write_targets
from cache.store import Root, StoredObject, check_name
from cache.types import Provenance, Targets, TeacherIdentity, Tokens

_LOG = logging.getLogger(__name__)

_KEY_LAYOUT = Layout((1 << 14, KEY_BYTES))
_AXIS_LAYOUT = Layout((1 << 16,))


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPolicy:
    """When waiting rows become a segment: at whichever comes first."""

    encoding: str = "u8"
    segment_positions: int = 65_536
    segment_seconds: float = 10.0
    waiting_positions: int = 262_144
    """Rows are answered but not kept while more than this waits, because the store takes nothing."""


@dataclass(frozen=True, slots=True)
class JournalRow:
    """One row to keep."""

    key: bytes
    tokens: Tokens
    exact: Targets
    """What the teacher answered: this is stored, so that nothing is encoded twice."""
    answer: Targets
    """The same through the journal's encoding: what callers get, now and when it is read back."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a kept row lies."""

    segment: SegmentReader
    start: int
    stop: int
    k: int


class Journal:
    """One process's journal of one teacher, and what earlier processes kept of the same identity. Thread-safe."""

    def __init__(self, root: Root, teacher: str, identity: TeacherIdentity, policy: JournalPolicy) -> None:
        self._root = root
        self._teacher = check_name("teacher", teacher)
        self._identity = identity
        self._encoding = encoding_by_name(policy.encoding)
        self._policy = policy
        self._ranks = RankTable.plain(identity.vocab_size)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._index: dict[bytes, list[_Stored]] = {}
        self._waiting: dict[bytes, dict[int, JournalRow]] = {}
        self._waiting_positions = 0
        self._oldest = 0.0
        self._next = 0
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:24].strip("-") or "host"
        self._process = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.skipped: list[str] = []
        """One line per journal segment that could not be used."""
        self._load()

    def find(self, key: bytes, k: int) -> Targets | None:
        """The kept targets of a row with at least `k` entries, all of them; None when there are none.

        Of several the one with the fewest entries answers, stored or not, so that an answer does not change when
        the row is stored, or scored again with more. A stored row that is damaged is forgotten, and named in `skipped`.
        """
        while True:
            with self._lock:
                stored = [place for place in self._index.get(key, ()) if place.k >= k]
                waiting = [row for kept, row in self._waiting.get(key, {}).items() if kept >= k]
            place = min(stored, key=lambda place: place.k, default=None)
            row = min(waiting, key=lambda row: row.exact.k, default=None)
            if place is None or (row is not None and row.exact.k < place.k):
                return None if row is None else row.answer
            try:
                return place.segment.read(place.start, place.stop)
            except CorruptSegment as error:
                self._skip(error)
                with self._lock:
                    self._index[key] = [other for other in self._index[key] if other is not place]

    def holds(self, key: bytes, k: int) -> bool:
        """Whether `find` has something to look at; reads nothing."""
        with self._lock:
            stored = any(place.k >= k for place in self._index.get(key, ()))
            return stored or any(kept >= k for kept in self._waiting.get(key, {}))

    def add(self, rows: list[JournalRow]) -> None:
        """Keep rows; they are found from now on, and stored by a later `flush`."""
        with self._lock:
            if not self._waiting:
                self._oldest = time.monotonic()
            for row in rows:
                if self._waiting_positions >= self._policy.waiting_positions:
                    return
                held = self._waiting.setdefault(row.key, {})
                if row.exact.k not in held:
                    held[row.exact.k] = row
                    self._waiting_positions += row.exact.num_positions

    def due(self) -> bool:
        """Whether the waiting rows are enough, or old enough, for a segment."""
        with self._lock:
            if not self._waiting:
                return False
            old = time.monotonic() - self._oldest >= self._policy.segment_seconds
            return old or self._waiting_positions >= self._policy.segment_positions

    def flush(self, provenance: Provenance) -> int:
        """Store the waiting rows, one segment per K; how many rows were stored.

        Raises:
            StoreError: the store is full; the rows go on waiting.
        """
        with self._writing:
            with self._lock:
                rows = [row for held in self._waiting.values() for row in held.values()]
            for k in sorted({row.exact.k for row in rows}):
                self._write([row for row in rows if row.exact.k == k], k, provenance)
            return len(rows)

    def _write(self, rows: list[JournalRow], k: int, provenance: Provenance) -> None:
        name = f"{self._teacher}-{self._next:06d}"
        self._next += 1
        path = f"journal/{self._process}/{name}"
        targets = Targets.concat([row.exact for row in rows])
        try:
            objects = self._write_group(path, rows, encode(targets, self._encoding, self._ranks))
        except BaseException:
            self._root.delete(path)
            raise
        record = {
            "teacher": self._teacher,
            "identity": self._identity.to_json(),
            "k": k,
            "encoding": self._encoding.name,
            "rows": len(rows),
            "positions": targets.num_positions,
            "objects": objects_to_json(objects),
            "provenance": provenance.to_json(),
        }
        created = self._root.create(f"{path}.json", record_bytes("journal", record))
        assert created, "a process's journal names are its own"
        self._register(path, record)
        with self._lock:
            for row in rows:
                held = self._waiting[row.key]
                del held[k]
                if not held:
                    del self._waiting[row.key]
                self._waiting_positions -= row.exact.num_positions
            self._oldest = time.monotonic()

    def _write_group(self, path: str, rows: list[JournalRow], stored: StoredArrays) -> tuple[StoredObject, ...]:
        writer = GroupWriter(self._root, path)
        starts = np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int64)
        keys = np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, KEY_BYTES)
        writer.write("tokens", np.concatenate([row.tokens for row in rows]), _AXIS_LAYOUT)
        writer.write("row_starts", starts, _AXIS_LAYOUT)
        writer.write("row_keys", keys, _KEY_LAYOUT)
        write_targets(writer, stored)
        return writer.finish()

    def _load(self) -> None:
        """Index what other processes kept of this teacher; damaged segments are left out and named."""
        for path in journal_records(self._root):
            try:
                record = read_record(self._root, f"{path}.json", "journal")
                if record is not None and record.get("teacher") == self._teacher:
                    self._register(path, record)
            except (CorruptSegment, FormatError) as error:
                self._skip(error)

    def _skip(self, error: PotstillError) -> None:
        self.skipped.append(error.detail)
        _LOG.warning("journal of teacher %s: %s; its rows are scored again", self._teacher, error.detail)

    def _register(self, path: str, record: dict[str, Any]) -> None:
        try:
            if TeacherIdentity.from_json(record["identity"]) != self._identity:
                return
            encoding = encoding_by_name(record["encoding"])
            k, num_rows, num_positions = (int(record[n]) for n in ("k", "rows", "positions"))
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise FormatError(f"{path}.json is not a journal record: {error!r}") from error
        group = _open_group(self._root, path, record)
        group.expect("row_keys", (num_rows, KEY_BYTES), ("uint8",))
        group.expect("row_starts", (num_rows + 1,), ("int64",))
        segment = SegmentReader(group, num_positions, k, encoding, self._ranks)
        keys = group.read_all("row_keys").tobytes()
        starts = group.read_all("row_starts").tolist()
        if starts[0] != 0 or starts[-1] != num_positions or starts != sorted(starts):
            raise CorruptSegment(f"{path}/row_starts does not rise from 0 to {num_positions}")
        with self._lock:
            for row in range(num_rows):
                key = keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]
                place = _Stored(segment, starts[row], starts[row + 1], k)
                self._index.setdefault(key, []).append(place)


def journal_records(root: Root) -> list[str]:
    """The path, without `.json`, of every journal record of every process."""
    return [
        f"journal/{process}/{name.removesuffix('.json')}"
        for process in root.folders("journal")
        for name in root.objects(f"journal/{process}")
        if name.endswith(".json")
    ]


def corrupt_journal_objects(root: Root, path: str) -> list[str]:
    """One line per object of a journal segment that is not what its record says."""
    try:
        record = read_record(root, f"{path}.json", "journal")
        return [] if record is None else _open_group(root, path, record).corrupt_objects()
    except (CorruptSegment, FormatError) as error:
        return [error.detail]


def _open_group(root: Root, path: str, record: dict[str, Any]) -> GroupReader:
    try:
        return GroupReader(root, path, objects_from_json(record["objects"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}.json is not a journal record: {error!r}") from error
