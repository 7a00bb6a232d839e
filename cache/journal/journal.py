"""The journal of a service: it keeps rows that were scored over HTTP and belong to no corpus.

    journal/<process>/<teacher>-<n>/       a segment with its own tokens, row starts and sorted keys
    journal/<process>/<teacher>-<n>.json   its record, created last: identity, fields, encoding, objects

Every process writes below a name of its own, so no two writers share an object. Rows wait in memory until they fill
a segment or have waited long enough; stored rows are looked up on disk, so that memory grows neither with rows nor
with time. Small segments are joined into larger ones (`journal.merge`), whichever process wrote them, and over the
quota the oldest are evicted; both are done to segments of the process's own identity alone. Both remove a record before
its group, and only after its replacement is published: a reader that loses a segment looks again, or counts a miss.

A crash costs work, never correctness. Waiting rows (at most `waiting_positions`) are scored again; a group without a
record is garbage that `potstill gc` removes. Two processes that join the same segments, or score the same row, may
store rows twice: then the one sealed first is used, and joining leaves only that one. Until both are stored, each
process answers with its own score.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potstill.cache.encoding import RankTable, decode
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.journal.index import JournalIndex
from potstill.cache.journal.merge import choose, merge
from potstill.cache.journal.segment import (
    JournalRow,
    JournalSegment,
    SegmentRecord,
    measured_error,
    publish,
    write_rows,
)
from potstill.cache.store import Claims, Root
from potstill.cache.store.root import check_name
from potstill.cache.types import Provenance, Targets, TeacherIdentity

_LOG = logging.getLogger(__name__)

CLAIMS = "claims"
"""Path below the root for the claims of processes that join segments."""

# No segment may be larger than this share of the quota, so that evicting one never empties much of the journal.
_LEAST_SEGMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPolicy:
    """Limits of a journal: when waiting rows become a segment, whichever limit comes first, and how much is kept.

    Raises:
        InvalidInput: journals do not use the encoding, or the quota is negative.
    """

    encoding: str = "u8"
    """Name of the encoding. Not `archive`, which is packed for a corpus' rank table and read in large blocks."""
    segment_positions: int = 65_536
    segment_seconds: float = 10.0
    waiting_positions: int = 262_144
    """Most positions that wait in memory. While the store takes nothing, rows over it are answered but not kept."""
    quota_bytes: int = 10 << 30
    """Most bytes of one teacher's identity over the journals of all processes; 0 keeps no rows, and evicts nothing.

    Every `tidy` enforces it. Segments sealed since then, or just being joined, come on top."""

    def __post_init__(self) -> None:
        if encoding_by_name(self.encoding).packed:
            raise InvalidInput(
                f"encoding {self.encoding!r} is for corpora; a journal keeps rows as 'u8', which has the same error"
            )
        if self.quota_bytes < 0:
            raise InvalidInput(f"the journal's quota is {self.quota_bytes} bytes; it must be at least 0")


class Journal:
    """One process's journal of a teacher, which also finds the rows of other processes; thread-safe."""

    def __init__(
        self,
        root: Root,
        teacher: str,
        identity: TeacherIdentity,
        policy: JournalPolicy,
        on_trouble: Callable[[PotstillError], None] = lambda error: _LOG.warning("%s", error.detail),
    ) -> None:
        self._root = root
        self._teacher = check_name("teacher", teacher)
        self._identity = identity
        self._policy = policy
        self.encoding = encoding_by_name(policy.encoding)
        """Encoding in which rows are kept."""
        self.ranks = RankTable.plain(identity.vocab_size)
        """The rank table of journals, in which every id is its own rank."""
        self.index = JournalIndex(root, teacher, identity, self.ranks, on_trouble)
        """The stored segments of all processes."""
        # Three locks, so that look-ups wait neither for a write to the store nor for a join that takes minutes.
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._tidying = threading.Lock()
        self._closed = threading.Event()
        self._waiting: dict[bytes, dict[int, JournalRow]] = {}
        self._waiting_positions = 0
        self._oldest = 0.0
        self._next = 0
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:24].strip("-") or "host"
        self._process = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.index.refresh()
        strange = next((d for record in self.index.records if (d := record.identity.differences(identity))), "")
        if strange:
            _LOG.warning("the journal keeps rows of another %s (%s), which answer nothing", teacher, strange)

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of all segments under the teacher's name, as of the last `tidy`."""
        return sum(record.num_bytes for record in self.index.records)

    def find(self, keys: Sequence[bytes], k: int) -> list[Targets | None]:
        """Find rows that are kept with at least `k` entries: their targets with all entries, or None.

        Where a row is kept several times, waiting or stored, the one with the fewest entries is used: so an answer
        does not change when the row is stored, or scored again with more. What cannot be read counts as not kept.
        """
        with self._lock:
            held = [self._waiting.get(key, {}) for key in keys]
            rows = [of.get(min((kept for kept in of if kept >= k), default=-1)) for of in held]
        stored = self.index.find(keys, k, [None if row is None else row.k for row in rows])
        return [
            stored[i] if i in stored else None if row is None else decode(row.stored, self.encoding, self.ranks)
            for i, row in enumerate(rows)
        ]

    def add(self, rows: Sequence[JournalRow]) -> None:
        """Keep rows: `find` finds them from now on, and a later `flush` stores them."""
        if not self._policy.quota_bytes:
            return
        with self._lock:
            if not self._waiting:
                self._oldest = time.monotonic()
            for row in rows:
                if self._waiting_positions >= self._policy.waiting_positions:
                    return
                held = self._waiting.setdefault(row.key, {})
                if row.k not in held:
                    held[row.k] = row
                    self._waiting_positions += len(row.tokens)

    def due(self) -> bool:
        """Tell whether the waiting rows are enough, or old enough, for a segment."""
        with self._lock:
            if not self._waiting:
                return False
            old = time.monotonic() - self._oldest >= self._policy.segment_seconds
            return old or self._waiting_positions >= self._policy.segment_positions

    def flush(self, provenance: Provenance) -> int:
        """Store the waiting rows, one segment for each K, and return how many they were.

        Raises:
            StoreError: the store is full or does not answer; the rows go on waiting.
        """
        with self._writing:
            with self._lock:
                rows = [row for held in self._waiting.values() for row in held.values()]
            for k in sorted({row.k for row in rows}):
                self._write([row for row in rows if row.k == k], k, provenance)
            return len(rows)

    def tidy(self) -> None:
        """List the segments again, evict the oldest ones over the quota, and join small ones.

        Raises:
            StoreError: the store does not answer or is full; nothing is lost.
        """
        with self._tidying:
            self.index.refresh()
            self._evict()
            while not self._closed.is_set() and self._choose():
                if not self._join():
                    return

    def close(self) -> None:
        """Stop a running `tidy` and wait for its end. Waiting rows are not stored: call `flush` for that."""
        self._closed.set()
        with self._tidying:
            pass

    def _write(self, rows: list[JournalRow], k: int, provenance: Provenance) -> None:
        now = self._seal_time()
        record = SegmentRecord(
            path=self._new_path(),
            teacher=self._teacher,
            identity=self._identity,
            k=k,
            encoding=self.encoding,
            num_rows=len(rows),
            num_positions=sum(len(row.tokens) for row in rows),
            since=now,
            sealed=now,
            error=measured_error(rows),
            provenance=provenance,
        )
        published = publish(self._root, record, lambda writer: write_rows(writer, rows))
        assert published is not None, "it is always wanted"
        # Into the index before the rows leave memory: in between, a look-up would miss them.
        self.index.add(published)
        with self._lock:
            for row in rows:
                held = self._waiting[row.key]
                del held[k]
                if not held:
                    del self._waiting[row.key]
                self._waiting_positions -= len(row.tokens)
            self._oldest = time.monotonic()

    def _seal_time(self) -> float:
        """The store's time, and later than that of every segment known: a clock that was wrong must not order them."""
        newest = max((record.sealed for record in self.index.records), default=0.0)
        return max(self._root.now(), math.nextafter(newest, math.inf))

    def _new_path(self) -> str:
        with self._lock:
            self._next += 1
            return f"journal/{self._process}/{self._teacher}-{self._next - 1:06d}"

    def _evict(self) -> None:
        if not self._policy.quota_bytes:
            return  # it keeps nothing itself; what others keep is theirs
        # Of this identity alone: under the same name another service may keep the answers of another model.
        records = [segment.record for segment in self.index.segments()]
        records.sort(key=lambda record: (record.sealed, record.path))
        total = sum(record.num_bytes for record in records)
        for record in records:
            if total <= self._policy.quota_bytes:
                return
            self.index.remove(record)
            total -= record.num_bytes
            _LOG.info("journal of teacher %s: evicted %s, over its quota", self._teacher, record.path)

    def _choose(self) -> list[JournalSegment]:
        return choose(self.index.segments(), self._policy.quota_bytes // _LEAST_SEGMENTS)

    def _join(self) -> bool:
        """Join the next few segments, unless another process is at it; True when there may be more to join."""
        with Claims(self._root, CLAIMS) as claims:
            name = f"journal-{self._teacher}"
            if name in claims.busy() or claims.take(name) is None:
                return False
            # Choose again: another process may have joined them before the claim was ours.
            self.index.refresh()
            segments = self._choose()
            if not segments:
                return False
            joined = merge(self._root, segments, self._new_path(), wanted=lambda: not self._closed.is_set())
            if joined is None:
                return False
            self.index.add(joined)
            for segment in segments:
                self.index.remove(segment.record)
            return True
