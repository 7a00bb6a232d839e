"""The journal segments of one teacher over all processes, and look-up of rows in them by key.

Other processes seal, join and evict segments while this one reads. When a segment is gone, it is dropped and the
listing read again, so that rows which were joined into another segment are found there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from potstill.cache.encoding import RankTable
from potstill.cache.errors import CorruptSegment, FormatError, PotstillError, StoreError
from potstill.cache.journal.segment import JournalSegment, SegmentRecord, journal_records, remove_segment
from potstill.cache.store import Reading, Root
from potstill.cache.types import Targets, TeacherIdentity

_LOG = logging.getLogger(__name__)

# A look-up starts again when segments vanished under it. After this many tries the rest counts as not kept.
_TRIES = 4


@dataclass(eq=False)
class JournalIndex:
    """The journal rows of one teacher and identity from all processes; thread-safe."""

    _root: Root
    _teacher: str
    _identity: TeacherIdentity
    _ranks: RankTable
    _on_trouble: Callable[[PotstillError], None]
    losses: int = 0
    """Rises whenever segments are found gone: their rows may be elsewhere now."""
    skipped: list[str] = field(default_factory=list)
    """One line for each segment or row that could not be used."""
    _reading: Reading = field(default_factory=Reading.open)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _records: dict[str, SegmentRecord] = field(default_factory=dict)
    _segments: dict[str, JournalSegment] = field(default_factory=dict)
    _unusable: set[str] = field(default_factory=set)
    _bad_rows: set[tuple[str, int]] = field(default_factory=set)

    @property
    def records(self) -> list[SegmentRecord]:
        """Records of all segments under the teacher's name, of any identity, as of the last `refresh`."""
        with self._lock:
            return list(self._records.values())

    def segments(self) -> list[JournalSegment]:
        """Segments of this identity as of the last `refresh`, in order of look-up: fewest entries, then oldest."""
        with self._lock:
            found = list(self._segments.values())
        return sorted(found, key=lambda segment: (segment.record.k, *segment.record.order))

    def refresh(self) -> None:
        """List the segments in the store again.

        Raises:
            StoreError: the store does not answer.
        """
        while True:
            # Processes are listed one by one. When segments are lost and none gained, their rows may have been joined
            # into a segment of a process that was listed before: list once more.
            lost, gained = self._list()
            if not lost or gained:
                return

    def add(self, record: SegmentRecord) -> None:
        """Add a segment that this process published."""
        with self._lock:
            self._records[record.path] = record
            if record.identity == self._identity:
                self._segments[record.path] = JournalSegment(self._root, record, self._ranks, self._reading)

    def remove(self, record: SegmentRecord) -> None:
        """Remove a segment from the journal, for all processes.

        Raises:
            StoreError: the store does not answer; the record may be gone, then `potstill gc` removes the rest.
        """
        self._drop(record.path)
        remove_segment(self._root, record)

    def find(self, keys: Sequence[bytes], k: int, waiting: Sequence[int | None]) -> dict[int, Targets]:
        """Find rows that are stored with at least `k` entries: their targets with all entries, by index into `keys`.

        Where several segments hold a row, the one with the fewest entries is used, of equal ones the oldest.
        `waiting[i]` is the K with which row i waits in memory, or None; a row that waits with fewer entries is left
        out. So are damaged rows and segments, which `skipped` then names, and what the store cannot give.
        """
        found: dict[int, Targets] = {}
        for _ in range(_TRIES):
            losses = self.losses
            found = self._look(keys, k, waiting)
            if losses == self.losses:
                break
            try:
                self.refresh()
            except (CorruptSegment, StoreError) as error:
                self._on_trouble(error)
                break
        return found

    def _look(self, keys: Sequence[bytes], k: int, waiting: Sequence[int | None]) -> dict[int, Targets]:
        found: dict[int, Targets] = {}
        for segment in self.segments():
            kept = segment.record.k
            if kept < k:
                continue
            left = [i for i, held in enumerate(waiting) if i not in found and (held is None or held >= kept)]
            if not left:
                continue
            try:
                found.update(self._look_in(segment, keys, left))
            except (CorruptSegment, FormatError, StoreError) as error:
                self._failed(segment, error)
        return found

    def _look_in(self, segment: JournalSegment, keys: Sequence[bytes], left: Sequence[int]) -> dict[int, Targets]:
        located = zip(left, segment.locate([keys[i] for i in left]), strict=True)
        path = segment.record.path
        rows = {i: row for i, row in located if row is not None and (path, row) not in self._bad_rows}
        try:
            return dict(zip(rows, segment.read(list(rows.values())), strict=True))
        except (CorruptSegment, FormatError):
            if not self._is_there(segment):
                raise
        return self._one_by_one(segment, rows)

    def _one_by_one(self, segment: JournalSegment, rows: dict[int, int]) -> dict[int, Targets]:
        """Read the rows that can be read where some are damaged; those are not tried again."""
        found = {}
        for i, row in rows.items():
            try:
                found[i] = segment.read([row])[0]
            except (CorruptSegment, FormatError) as error:
                self._bad_rows.add((segment.record.path, row))
                self._skip(error)
        return found

    def _failed(self, segment: JournalSegment, error: PotstillError) -> None:
        """Drop a segment that is gone or damaged; when it is the store that fails, only report it."""
        try:
            there = self._is_there(segment)
        except StoreError as second:
            self._on_trouble(second)
            return
        if not there:
            self._drop(segment.record.path)
            self.losses += 1
        elif isinstance(error, StoreError):
            self._on_trouble(error)
        else:
            self._unusable.add(segment.record.path)
            self._drop(segment.record.path)
            self._skip(error)

    def _is_there(self, segment: JournalSegment) -> bool:
        return self._root.get(f"{segment.record.path}.json") is not None

    def _list(self) -> tuple[bool, bool]:
        """List the segments; returns two answers: are some gone since the last listing, and are some new."""
        listed = set(journal_records(self._root, self._teacher))
        with self._lock:
            known = set(self._records)
        # Ask for each record: one that was published while we listed is not lost.
        lost = {path for path in known - listed if self._root.get(f"{path}.json") is None}
        for path in lost:
            self._drop(path)
        self.losses += bool(lost)
        new = [record for path in sorted(listed - known - self._unusable) if (record := self._read(path)) is not None]
        for record in new:
            self.add(record)
        return bool(lost), bool(new)

    def _read(self, path: str) -> SegmentRecord | None:
        try:
            return SegmentRecord.read(self._root, path)
        except (CorruptSegment, FormatError) as error:
            self._unusable.add(path)
            self._skip(error)
            return None

    def _drop(self, path: str) -> None:
        with self._lock:
            self._records.pop(path, None)
            self._segments.pop(path, None)

    def _skip(self, error: PotstillError) -> None:
        self.skipped.append(error.detail)
        _LOG.warning("journal of teacher %s: %s; its rows are scored again", self._teacher, error.detail)
