"""Rows of one teacher with at least K entries from the journals of all processes, each row once.

Shape legend:  R rows, K kept entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.keys import first_of_each_key
from potstill.cache.encoding import ENCODINGS, Encoding, RankTable
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import CorruptSegment, FormatError, InvalidInput, NotFound, StoreError
from potstill.cache.journal.index import JournalIndex
from potstill.cache.journal.segment import (
    TOKENS,
    JournalSegment,
    SegmentRecord,
    journal_records,
    teacher_of,
)
from potstill.cache.store import Root
from potstill.cache.types import Provenance, Targets, TeacherIdentity, Tokens

_LOG = logging.getLogger(__name__)

_T = TypeVar("_T")

# A read starts again when a service joined or evicted segments under it; that seldom happens twice in a row.
_TRIES = 5
# Tokens read at once: 1 MiB.
_POSITIONS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class JournalRows:
    """The journal's rows with at least K entries. Services may move them to other segments while they are read."""

    index: JournalIndex
    identity: TeacherIdentity
    k: int
    encoding: Encoding
    provenance: Provenance

    @classmethod
    def open(cls, root: Root, teacher: str, k: int | None) -> JournalRows:
        """Open the rows of the teacher's newest identity. `k` may be None when all its rows have the same K.

        Raises:
            NotFound: no row of the teacher is kept, or none with `k` entries.
            InvalidInput: rows have several K, and none was chosen.
            FormatError, CorruptSegment: a record cannot be read.
        """
        paths = journal_records(root, teacher)
        records = [record for path in paths if (record := SegmentRecord.read(root, path)) is not None]
        if not records:
            known = ", ".join(journal_teachers(root)) or "none"
            raise NotFound(f"teacher {teacher!r} has no journal in {root.url}; there are journals of: {known}")
        newest = max(records, key=lambda record: (record.sealed, record.path))
        own = [record for record in records if record.identity == newest.identity]
        k = _one_k(teacher, k, own)
        enough = [record for record in own if record.k >= k]
        if not enough:
            most = max(record.k for record in own)
            raise NotFound(
                f"the journal keeps no row of teacher {teacher!r} with {k} entries; the most is {most}: "
                f"take --top-k {most}"
            )
        plain = RankTable.plain(newest.identity.vocab_size)
        index = JournalIndex(root, teacher, newest.identity, plain, lambda error: _LOG.warning("%s", error))
        index.refresh()
        return cls(index, newest.identity, k, _most_used(enough), newest.provenance)

    def segments(self) -> list[JournalSegment]:
        """Segments with at least K entries, in order: where several hold a row, the first one is used."""
        return [segment for segment in self.index.segments() if segment.record.k >= self.k]

    def retry_if_moved(self, read: Callable[[], _T]) -> _T:
        """Call `read`, again when it fails because segments were moved meanwhile."""
        for _ in range(_TRIES - 1):
            losses = self.index.losses
            try:
                return read()
            except (CorruptSegment, FormatError, StoreError):
                self.index.refresh()
                if losses == self.index.losses:
                    raise
        return read()

    def locate(self, keys: Sequence[bytes]) -> list[tuple[JournalSegment, int] | None]:
        """Segment and row number in it for each key; None for a row that is not kept."""
        found: list[tuple[JournalSegment, int] | None] = [None] * len(keys)
        for segment in self.segments():
            left = [i for i, place in enumerate(found) if place is None]
            if not left:
                break
            for i, row in zip(left, segment.locate([keys[i] for i in left]), strict=True):
                found[i] = None if row is None else (segment, row)
        return found

    def targets(self, keys: Sequence[bytes]) -> Targets:
        """Read the targets of rows by key, cut to K entries; rows that are not kept are left out."""
        places = [place for place in self.locate(keys) if place is not None]
        return Targets.concat([segment.read([row])[0].prefix(self.k) for segment, row in places])


def journal_teachers(root: Root) -> list[str]:
    """Names of the teachers that have a journal, sorted."""
    return sorted({teacher_of(path) for path in journal_records(root)})


def _one_k(teacher: str, k: int | None, records: Sequence[SegmentRecord]) -> int:
    if k is not None:
        return k
    found = sorted({record.k for record in records})
    if len(found) > 1:
        raise InvalidInput(
            f"the journal keeps rows of teacher {teacher!r} with {', '.join(map(str, found))} entries; "
            "choose with --top-k: rows with fewer stay in the journal"
        )
    return found[0]


def _most_used(records: Sequence[SegmentRecord]) -> Encoding:
    """The encoding of most positions, so that as few rows as possible are decoded and encoded again."""
    positions = {
        name: sum(record.num_positions for record in records if record.encoding.name == name) for name in ENCODINGS
    }
    return encoding_by_name(max(positions, key=lambda name: positions[name]))


def first_rows(source: JournalRows) -> tuple[list[tuple[JournalSegment, NDArray[np.int64]]], int]:
    """Ranges [R, 2] of positions of the rows that no earlier segment has, by segment; and the longest row's tokens."""
    segments = source.segments()
    found, longest = [], 1
    for segment, first in zip(segments, first_of_each_key([segment.row_keys() for segment in segments]), strict=True):
        starts = segment.starts()
        ranges = np.stack([starts[:-1], starts[1:]], axis=1)[first]
        # A corpus has no empty rows.
        ranges = ranges[ranges[:, 1] > ranges[:, 0]]
        longest = max(longest, int(np.diff(ranges, axis=1).max(initial=1)))
        found.append((segment, ranges))
    return found, longest


def tokens_of(first: Sequence[tuple[JournalSegment, NDArray[np.int64]]], vocab_size: int) -> Iterator[Tokens]:
    """Read the tokens of rows. A row with an id that the tokenizer does not have cannot be in a corpus: left out."""
    for segment, ranges in first:
        block, low = np.empty(0, np.uint32), 0
        for start, stop in ranges.tolist():
            if stop > low + len(block):
                low = start
                high = min(max(stop, start + _POSITIONS_AT_ONCE), segment.record.num_positions)
                block = segment.array(TOKENS, low, high)
            row = block[start - low : stop - low]
            if int(row.max()) < vocab_size:
                yield row
