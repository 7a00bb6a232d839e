"""Copies of journal rows for a segment of a corpus, with their encoding error.

Rows whose K and encoding are the wanted ones are copied bit by bit, and keep the error figures that were measured
against the teacher's answers (of their whole journal segment). Others are decoded and encoded again; their figures
compare the new arrays with what the journal kept, because the teacher's own numbers are gone. Bounds and figures are
never added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from potstill.cache.encoding import Encoding, RankTable
from potstill.cache.encoding.logprobs import StoredArrays, encode_measured
from potstill.cache.errors import SpecMismatch
from potstill.cache.journal.rows import JournalRows
from potstill.cache.journal.segment import JournalSegment, SegmentRecord, joined_arrays, joined_error
from potstill.cache.lineage import JOURNAL, Step, is_stated
from potstill.cache.targets.segment import EncodedSegment
from potstill.cache.types import Targets


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """Stored arrays of rows, with token ids (not yet ranks), and the step that their provenance gains."""

    segment: EncodedSegment
    step: Step
    """The way the rows came. It names an encoding where error figures compare with the journal, not with the teacher:
    the loosest that such rows were in. `partly` says that the figures of other rows compare with the teacher."""


@dataclass(frozen=True, slots=True)
class _SegmentRows:
    """Rows from one journal segment."""

    arrays: list[StoredArrays]
    """Stored arrays of each row."""
    error: dict[str, float]
    again: Encoding | None
    """The journal's encoding, where `error` compares with the journal; None where it compares with the teacher."""

    @property
    def num_positions(self) -> int:
        return sum(len(each["log_tail"]) for each in self.arrays)


def copy_rows(source: JournalRows, keys: Sequence[bytes]) -> CopiedRows:
    """Read rows by key, in the encoding and K of `source`, one after the other.

    Raises:
        SpecMismatch: a row has left the journal. CorruptSegment, FormatError, StoreError: a row cannot be read.
    """
    of_segment: dict[JournalSegment, dict[int, int]] = defaultdict(dict)
    for i, place in enumerate(source.locate(keys)):
        if place is None:
            raise SpecMismatch("rows left the journal while they were compacted; raise its quota and start again")
        of_segment[place[0]][i] = place[1]
    rows: dict[int, StoredArrays] = {}
    parts = []
    for segment, wanted in of_segment.items():
        part = _copied(source, segment, list(wanted.values()))
        rows.update(zip(wanted, part.arrays, strict=True))
        parts.append(part)
    again = [part.again for part in parts if part.again is not None and part.again.max_abs_error]
    joined = EncodedSegment(
        joined_arrays([rows[i] for i in range(len(keys))]),
        joined_error([(part.error, part.num_positions) for part in parts]),
    )
    if not again:
        return CopiedRows(joined, Step(how=JOURNAL))
    loosest, partly = max(again, key=lambda encoding: encoding.max_abs_error), len(again) < len(parts)
    step = Step(how=JOURNAL, encoding=loosest.name, max_abs_error=loosest.max_abs_error, partly=partly)
    return CopiedRows(joined, step)


def _copied(source: JournalRows, segment: JournalSegment, rows: Sequence[int]) -> _SegmentRows:
    record = segment.record
    if (record.k, record.encoding) != (source.k, source.encoding):
        return _encoded_again(source, segment, rows)
    stored = segment.read_stored(rows)
    if not is_stated(record.error, record.encoding.max_abs_error):
        return _SegmentRows(stored, dict(record.error), None)
    # Format 1 measured nothing, so only this much is known: the copy equals what the journal kept.
    return _SegmentRows(stored, _with_saturated(dict.fromkeys(record.error, 0.0), record), record.encoding)


def _encoded_again(source: JournalRows, segment: JournalSegment, rows: Sequence[int]) -> _SegmentRows:
    targets = [found.prefix(source.k) for found in segment.read(rows)]
    plain = RankTable.plain(source.identity.vocab_size)
    stored, error = encode_measured(Targets.concat(targets), source.encoding, plain)
    ends = np.cumsum([each.num_positions for each in targets])[:-1]
    split = {name: np.split(array, ends) for name, array in stored.items()}
    arrays = [{name: parts[row] for name, parts in split.items()} for row in range(len(targets))]
    return _SegmentRows(arrays, _with_saturated(asdict(error), segment.record), segment.record.encoding)


def _with_saturated(error: dict[str, float], record: SegmentRecord) -> dict[str, float]:
    """Add the saturated entries of the first encoding: the second one cannot see how far off they are."""
    names = ("saturated", "saturated_mass")
    return {**error, **{name: error[name] + record.error[name] for name in names}}
