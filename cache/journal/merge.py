"""Merging of small journal segments into larger ones, so that a look-up asks few of them.

As in a log-structured merge tree, segments of about one size are joined once there are many of them. Only neighbours
in the order of look-up are joined, so that no answer changes. Stored arrays are copied block by block without
decoding. Memory holds one block of one array, and 32 bytes a row.

Shape legend:  R rows, P positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.keys import first_of_each_key
from potstill.cache.errors import CorruptSegment, FormatError, StoreError
from potstill.cache.journal.segment import (
    TOKEN_LAYOUT,
    TOKENS,
    JournalSegment,
    SegmentRecord,
    joined_error,
    publish,
    write_row_index,
)
from potstill.cache.store import GroupWriter, Root
from potstill.cache.store.new_arrays import Layout
from potstill.cache.targets.segment import array_layout

MANY = 16
"""Segments that one tier may have; more are joined."""
# Ratio between the sizes of two tiers. Segments below the first tier were sealed because of their age.
_TIER = 16
_FIRST_TIER_POSITIONS = 1 << 14
_LARGEST_POSITIONS = 1 << 23
# Positions whose arrays are written as one object each: 51 MB together at K = 64, before compression.
_BLOCK_POSITIONS = 1 << 18
# Positions read at a time: a whole number of chunks of every array.
_READ_POSITIONS = 1 << 16


@dataclass(frozen=True, slots=True)
class _JournalRange:
    """A range of one segment's positions to copy: rows that no earlier segment has."""

    segment: JournalSegment
    start: int
    stop: int


def choose(segments: Sequence[JournalSegment], max_bytes: int) -> list[JournalSegment]:
    """Choose the segments to join next, in the order of look-up, of `max_bytes` together; none when there are few."""
    alike: dict[tuple[int, str], list[JournalSegment]] = defaultdict(list)
    for segment in sorted(segments, key=lambda segment: segment.record.order):
        alike[segment.record.k, segment.record.encoding.name].append(segment)
    for tier in range(_tier(_LARGEST_POSITIONS) + 1):
        for candidates in alike.values():
            for run in _neighbours(candidates, tier, max_bytes):
                fitting = _fitting(run, max_bytes)
                if len(run) > MANY and _balanced(fitting):
                    return fitting
    return []


def merge(
    root: Root, segments: Sequence[JournalSegment], path: str, *, wanted: Callable[[], bool] = lambda: True
) -> SegmentRecord | None:
    """Publish one segment at `path` with the rows of `segments`, which stay; of rows with one key, the first.

    None when it is no longer `wanted`, or a segment is gone or damaged; then nothing is left behind.

    Raises:
        StoreError: the store is full or cannot be written.
    """
    records = [segment.record for segment in segments]
    try:
        ranges, lengths, keys = _first_rows(segments)
        record = replace(
            records[0],
            path=path,
            num_rows=len(lengths),
            num_positions=int(lengths.sum()),
            since=min(record.since for record in records),
            sealed=max(record.sealed for record in records),
            error=joined_error([(record.error, record.num_positions) for record in records]),
            provenance=records[-1].provenance,
            objects=(),
        )

        def write(writer: GroupWriter) -> None:
            _write(writer, ranges, lengths, keys, wanted)

        # Asked right before the record is created: a row that was evicted meanwhile must not come back.
        def complete() -> bool:
            return wanted() and all(root.get(f"{each.path}.json") is not None for each in records)

        return publish(root, record, write, wanted=complete)
    except (CorruptSegment, FormatError, _StoppedError):
        return None
    except StoreError:
        if all(root.get(f"{each.path}.json") is not None for each in records):
            raise
        return None


class _StoppedError(Exception):
    """Signals that the joined segment is no longer wanted."""


def _neighbours(segments: Sequence[JournalSegment], tier: int, max_bytes: int) -> Iterator[list[JournalSegment]]:
    """Runs of neighbours of the tier or below. A segment over half of the largest size is never joined again."""
    run: list[JournalSegment] = []
    for segment in segments:
        positions, num_bytes = segment.record.num_positions, segment.record.num_bytes
        small = positions <= _LARGEST_POSITIONS // 2 and num_bytes <= max_bytes // 2
        if small and _tier(positions) <= tier:
            run.append(segment)
        else:
            yield run
            run = []
    yield run


def _fitting(run: Sequence[JournalSegment], max_bytes: int) -> list[JournalSegment]:
    fitting: list[JournalSegment] = []
    positions = num_bytes = 0
    for segment in run:
        positions += segment.record.num_positions
        num_bytes += segment.record.num_bytes
        if positions > _LARGEST_POSITIONS or num_bytes > max_bytes:
            break
        fitting.append(segment)
    return fitting


def _balanced(segments: Sequence[JournalSegment]) -> bool:
    """Tell whether no segment is larger than the others together.

    Then every copy at least doubles the segment that a row is in, which bounds how often a row is copied.
    """
    positions = [segment.record.num_positions for segment in segments]
    return len(positions) > 1 and 2 * max(positions) <= sum(positions)


def _tier(positions: int) -> int:
    return max(0, math.ceil(math.log(max(positions, 1) / _FIRST_TIER_POSITIONS, _TIER)))


def _first_rows(segments: Sequence[JournalSegment]) -> tuple[list[_JournalRange], NDArray[np.int64], NDArray[np.uint8]]:
    """Ranges to copy, with lengths [R] and keys [R, 16] of their rows; of rows with one key, the first."""
    all_keys = [segment.row_keys() for segment in segments]
    ranges: list[_JournalRange] = []
    lengths, keys = [], []
    for segment, own, kept in zip(segments, all_keys, first_of_each_key(all_keys), strict=True):
        starts = segment.starts()
        lengths.append(np.diff(starts)[kept])
        keys.append(own[kept])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
        ranges += [_JournalRange(segment, int(starts[a]), int(starts[b])) for a, b in edges.reshape(-1, 2)]
    return ranges, np.concatenate(lengths), np.concatenate(keys)


def _write(
    writer: GroupWriter,
    ranges: Sequence[_JournalRange],
    lengths: NDArray[np.int64],
    keys: NDArray[np.uint8],
    wanted: Callable[[], bool],
) -> None:
    write_row_index(writer, lengths, keys)
    total = int(lengths.sum())
    for name in (TOKENS, *ranges[0].segment.names):
        empty = [each.segment.array(name, 0, 0) for each in ranges]
        dtype = np.result_type(*{part.dtype for part in empty})
        shape = (total, *empty[0].shape[1:])
        size = min(_BLOCK_POSITIONS, max(total, 1))
        layout = Layout(TOKEN_LAYOUT.chunk, size) if name == TOKENS else array_layout(name, shape, size)
        array = writer.array(name, shape, dtype, layout)
        for start, block in _blocks(name, ranges, np.empty((size, *shape[1:]), dtype)):
            if not wanted():
                raise _StoppedError
            writer.put(array, start, block)


def _blocks(name: str, ranges: Sequence[_JournalRange], block: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Read an array of all ranges in blocks, each with its start. All use the memory of `block`: copy what you keep."""
    start = held = 0
    for each in ranges:
        at = each.start
        while at < each.stop:
            # Stop where a chunk ends, so that none is decoded twice.
            stop = min(each.stop, at + len(block) - held, (at // _READ_POSITIONS + 1) * _READ_POSITIONS)
            block[held : held + stop - at] = each.segment.array(name, at, stop)
            held, at = held + stop - at, stop
            if held == len(block):
                yield start, block
                start, held = start + held, 0
    if held:
        yield start, block[:held]
