"""What a service keeps of rows that were asked for over HTTP and belong to no corpus.

    journal/<process>/<teacher>-<n>/       a segment with its own tokens, row starts and sorted keys
    journal/<process>/<teacher>-<n>.json   its record, created last: identity, fields, encoding, objects

Every process writes below a name of its own, so no two writers share an object. Rows are held in memory until a
segment is worth writing or has waited long enough; stored rows are found on disk, so that memory grows with neither
rows nor time. Many small segments are joined into larger ones (`journal.merge`), whichever process wrote them;
over the quota the oldest are evicted. Both remove a record before its group, and only after what replaces it is
published: a reader that loses a segment looks again or takes it as a miss.

What a crash may cost is work, never correctness: rows that waited (at most `waiting_positions`) are scored again; a
group whose record was not created, or was removed just before, is garbage that `potstill gc` removes. Two processes
that join the same segments at once, or score the same row, may store rows twice: of equal ones the first sealed
answers, and joining leaves one. Before both are stored, each process answers with its own score.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potstill.cache.encoding.logprobs import Encoding, RankTable, decode, encoding_by_name
from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.journal.index import JournalIndex
from potstill.cache.journal.merge import choose, merge
from potstill.cache.journal.segment import (
    JournalRow,
    SegmentRecord,
    corrupt_journal_objects,
    journal_records,
    measured_error,
    publish,
    write_rows,
)
from potstill.cache.store.claims import Claims
from potstill.cache.store.root import Root, check_name
from potstill.cache.types import Provenance, Targets, TeacherIdentity

__all__ = ["Journal", "JournalPolicy", "corrupt_journal_objects", "journal_records"]

_LOG = logging.getLogger(__name__)

CLAIMS = "claims"
"""Where processes say that they are joining segments, below the root; it decides nothing."""

# So that evicting the oldest segment never empties much of the journal.
_LEAST_SEGMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPolicy:
    """When waiting rows become a segment, at whichever comes first, and how much is kept.

    Raises:
        InvalidInput: an encoding that journals do not use, or a negative quota.
    """

    encoding: str = "u8"
    """Not `archive`: it is packed for a corpus' rank table and read in large blocks."""
    segment_positions: int = 65_536
    segment_seconds: float = 10.0
    waiting_positions: int = 262_144
    """Rows are answered but not kept while more than this waits, because the store takes nothing."""
    quota_bytes: int = 10 << 30
    """Of one teacher over the journals of all processes, looked at by every `tidy`: what is sealed in between, and the
    segments that are just being joined, come on top. 0 keeps nothing, and evicts what earlier runs kept."""

    def __post_init__(self) -> None:
        if encoding_by_name(self.encoding).packed:
            raise InvalidInput(
                f"encoding {self.encoding!r} is for corpora; a journal keeps rows as 'u8', which has the same error"
            )
        if self.quota_bytes < 0:
            raise InvalidInput(f"the journal's quota is {self.quota_bytes} bytes; it must be at least 0")


class Journal:
    """One process's journal of one teacher, and what other processes keep of the same identity. Thread-safe."""

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
        self._encoding = encoding_by_name(policy.encoding)
        self._ranks = RankTable.plain(identity.vocab_size)
        self._index = JournalIndex(root, teacher, identity, self._ranks, on_trouble)
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
        self._index.refresh()

    @property
    def encoding(self) -> Encoding:
        """How rows are kept."""
        return self._encoding

    @property
    def ranks(self) -> RankTable:
        """Ids as they are."""
        return self._ranks

    @property
    def skipped(self) -> list[str]:
        """One line per journal segment or row that could not be used."""
        return self._index.skipped

    @property
    def losses(self) -> int:
        """Rises when segments were found gone: evicted, joined, or moved into a corpus."""
        return self._index.losses

    @property
    def stored_bytes(self) -> int:
        """Of all segments under the teacher's name, as of the last `tidy`."""
        return sum(record.num_bytes for record in self._index.records)

    def find(self, keys: Sequence[bytes], k: int) -> list[Targets | None]:
        """The kept targets of each row with at least `k` entries, all of them; None where there are none.

        Of several the one with the fewest entries answers, stored or not, so that an answer does not change when
        the row is stored, or scored again with more. What cannot be read is taken as not kept.
        """
        with self._lock:
            held = [self._waiting.get(key, {}) for key in keys]
            rows = [min((row for kept, row in of.items() if kept >= k), key=_k_of, default=None) for of in held]
        stored = self._index.find(keys, k, [None if row is None else row.k for row in rows])
        return [
            stored[i] if i in stored else None if row is None else decode(row.stored, self._encoding, self._ranks)
            for i, row in enumerate(rows)
        ]

    def add(self, rows: Sequence[JournalRow]) -> None:
        """Keep rows; they are found from now on, and stored by a later `flush`."""
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
            for k in sorted({row.k for row in rows}):
                self._write([row for row in rows if row.k == k], k, provenance)
            return len(rows)

    def tidy(self) -> None:
        """See what other processes did, evict the oldest segments over the quota, and join small ones.

        Raises:
            StoreError: the store does not answer or is full; nothing is lost.
        """
        with self._tidying:
            self._index.refresh()
            self._evict()
            while not self._closed.is_set() and self._choose():
                if not self._join():
                    return

    def close(self) -> None:
        """Stop a running `tidy` and wait for its end; what is waiting is not flushed here."""
        self._closed.set()
        with self._tidying:
            pass

    def _write(self, rows: list[JournalRow], k: int, provenance: Provenance) -> None:
        now = time.time()
        record = SegmentRecord(
            path=self._new_path(),
            teacher=self._teacher,
            identity=self._identity,
            k=k,
            encoding=self._encoding,
            num_rows=len(rows),
            num_positions=sum(len(row.tokens) for row in rows),
            since=now,
            sealed=now,
            error=measured_error(rows),
            provenance=provenance,
        )
        published = publish(self._root, record, lambda writer: write_rows(writer, rows))
        assert published is not None, "it is always wanted"
        self._index.add(published)
        with self._lock:
            for row in rows:
                held = self._waiting[row.key]
                del held[k]
                if not held:
                    del self._waiting[row.key]
                self._waiting_positions -= len(row.tokens)
            self._oldest = time.monotonic()

    def _new_path(self) -> str:
        with self._lock:
            self._next += 1
            return f"journal/{self._process}/{self._teacher}-{self._next - 1:06d}"

    def _evict(self) -> None:
        records = sorted(self._index.records, key=lambda record: (record.sealed, record.path))
        total = sum(record.num_bytes for record in records)
        for record in records:
            if total <= self._policy.quota_bytes:
                return
            self._index.remove(record)
            total -= record.num_bytes
            _LOG.info("journal of teacher %s: evicted %s, over its quota", self._teacher, record.path)

    def _choose(self) -> bool:
        return bool(choose(self._index.segments(), self._policy.quota_bytes // _LEAST_SEGMENTS))

    def _join(self) -> bool:
        """Join the next few segments, unless another process is at it; whether to go on."""
        with Claims(self._root, CLAIMS) as claims:
            name = f"journal-{self._teacher}"
            if name in claims.busy() or claims.take(name) is None:
                return False
            # What another process joined before the claim was ours is not joined again.
            self._index.refresh()
            segments = choose(self._index.segments(), self._policy.quota_bytes // _LEAST_SEGMENTS)
            if not segments:
                return False
            joined = merge(self._root, segments, self._new_path(), wanted=lambda: not self._closed.is_set())
            if joined is None:
                return False
            self._index.add(joined)
            for segment in segments:
                self._index.remove(segment.record)
            return True


def _k_of(row: JournalRow) -> int:
    return row.k
