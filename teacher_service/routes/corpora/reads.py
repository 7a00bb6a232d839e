"""Reads of committed targets: the part of a target set that a request asks for, in blocks, with its ETag.

Shape legend:  P positions, K kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput, LimitExceeded
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.targets import Commit, TargetSet
from potstill.cache.types import JSON, Fields, Targets
from potstill.cache.wire import StreamHead, write_targets
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport.headers import strong_etag

BLOCK_BYTES = 4 << 20
"""Most bytes of a record batch, about, and so the unit of what either end holds of a stream."""
HELD_BLOCKS = 3
"""Blocks that a stream holds at a time: one that is sent, one that is read ahead, and its arrays."""
_GROUP_ROWS = 256  # bounds the objects of one read where rows are short


@dataclass(frozen=True, slots=True)
class RangeRead:
    """The fields `want` of positions `start` to `stop` of a target set."""

    targets: TargetSet
    start: int
    stop: int
    want: Fields

    def require_committed(self) -> list[Commit]:
        """Look up the commits that hold the range, and read nothing else.

        Raises:
            InvalidInput: a range outside the corpus. NotCommitted: a shard that has no targets yet.
        """
        self.targets.corpus.require_positions(self.start, self.stop)
        return self.targets.commits_of(list(self._shards()), self.want)

    def etag(self, commits: Sequence[Commit], media_type: str) -> str:
        """ETag of the stored objects' hashes, the range and the fields: the same from every service at any time."""
        held: list[JSON] = [
            [c.shard, c.segment, c.spec_sha256, c.ranks_sha256, *(o.sha256 for o in c.objects)] for c in commits
        ]
        # Commits hold a hash of the spec and thus of the identity, except in format 1, so the identity is added.
        identity, corpus = self.targets.identity.to_json(), self.targets.corpus.fingerprint
        return strong_etag(media_type, corpus, identity, held, self.start, self.stop, self.want.to_json())

    def head(self) -> StreamHead:
        """The head of the range's stream."""
        return _head(self.targets, self.want, batches=sum(1 for _ in self._blocks()), length=self.num_positions)

    @property
    def num_positions(self) -> int:
        """Positions of the range."""
        return self.stop - self.start

    @property
    def held_bytes(self) -> int:
        """Most bytes that a stream of the range holds at a time, about."""
        block = min(self.num_positions, self._block_positions())
        return HELD_BLOCKS * block * self.want.bytes_per_position(self.targets.identity.vocab_size)

    def read(self) -> list[Targets]:
        """Read the whole range at once."""
        return [self._read(self.start, self.stop)]

    def pieces(self) -> Iterator[bytes]:
        """Stream one record batch per block. Raises as `TargetSet.read` does, between two pieces."""
        return write_targets(self.head(), ([self._read(start, stop)] for start, stop in self._blocks()))

    def _read(self, start: int, stop: int) -> Targets:
        return self.targets.read(start, stop, fields=self.want)

    def _shards(self) -> range:
        starts = self.targets.corpus.shard_starts
        first = int(np.searchsorted(starts, self.start, side="right")) - 1
        return range(first, int(np.searchsorted(starts, self.stop, side="left")))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Cut the range where chunks of stored arrays begin, so that no chunk is decoded for two blocks."""
        starts, step = self.targets.corpus.shard_starts, self._block_positions()
        for shard in self._shards():
            low, high = int(starts[shard]), min(int(starts[shard + 1]), self.stop)
            at = max(low, self.start)
            while at < high:
                end = min(high, at + step - (at - low) % step)
                yield at, end
                at = end

    def _block_positions(self) -> int:
        # Chunks are cut at multiples of powers of two too.
        fitting = BLOCK_BYTES // self.want.bytes_per_position(self.targets.identity.vocab_size)
        return 1 << max(fitting.bit_length() - 1, 0)


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The fields `want` of some rows' targets, in the order they are asked for."""

    targets: TargetSet
    rows: Sequence[int]
    want: Fields
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, targets: TargetSet, rows: Sequence[int], want: Fields) -> RowsRead:
        """Look up the rows' lengths, and that their targets are committed.

        Raises:
            InvalidInput: no rows, or one that is not in the corpus. NotCommitted: one that has no targets yet.
        """
        if not rows:
            raise InvalidInput("rows is empty; ask for at least one")
        corpus = targets.corpus
        ranges = corpus.row_ranges(rows)
        shards = np.searchsorted(corpus.shard_rows, np.asarray(rows, np.int64), side="right") - 1
        targets.commits_of(np.unique(shards).tolist(), want)
        return cls(targets, rows, want, ranges[:, 1] - ranges[:, 0])

    @property
    def num_positions(self) -> int:
        """Positions of all rows."""
        return int(self.lengths.sum())

    def pieces(self) -> Iterator[bytes]:
        """Stream one record batch per row. Raises as `TargetSet.read_rows` does, between two pieces."""
        head = _head(self.targets, self.want, batches=len(self.rows), length=self.num_positions)
        return write_targets(head, (self._read(start, stop) for start, stop in self._groups()))

    @property
    def held_bytes(self) -> int:
        """Most bytes that a stream of the rows holds at a time, about."""
        per_position = self.want.bytes_per_position(self.targets.identity.vocab_size)
        block = max(BLOCK_BYTES // per_position, int(self.lengths.max()))
        return HELD_BLOCKS * min(self.num_positions, block) * per_position

    def read(self) -> list[Targets]:
        """Read all rows at once."""
        return self._read(0, len(self.rows))

    def _read(self, start: int, stop: int) -> list[Targets]:
        return self.targets.read_rows(self.rows[start:stop], fields=self.want)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Ranges of `rows` that are read together: about `BLOCK_BYTES`, or one longer row."""
        most = BLOCK_BYTES // self.want.bytes_per_position(self.targets.identity.vocab_size)
        return row_batches(row_starts(self.lengths), most, max_rows=_GROUP_ROWS)


def require_at_most(count: int, limit: int, what: str, setting: str) -> None:
    """Refuse a count over a limit of the settings.

    Raises:
        LimitExceeded: the message names both.
    """
    if count > limit:
        raise LimitExceeded(f"{count} {what} are over {setting}={limit}; read fewer at a time")


def _head(targets: TargetSet, want: Fields, *, batches: int, length: int) -> StreamHead:
    return StreamHead(
        batches=batches,
        length=length,
        corpus=targets.corpus.fingerprint,
        identity=targets.identity,
        fields=want,
    )


def require_within(read: RangeRead | RowsRead, limits: LimitSettings, *, as_json: bool) -> None:
    """Refuse a read that is too large for one answer. JSON is bounded in bytes too, as its arrays are held to its end.

    Raises:
        LimitExceeded: the message names the count and the limit.
    """
    if not as_json:
        require_at_most(read.num_positions, limits.max_stream_positions, "positions", "max_stream_positions")
        return
    require_at_most(read.num_positions, limits.max_range_positions, "positions as JSON", "max_range_positions")
    require_at_most(num_bytes(read), limits.max_answer_bytes, "bytes of targets as JSON", "max_answer_bytes")


def num_bytes(read: RangeRead | RowsRead) -> int:
    """Bytes of the targets as arrays."""
    return read.num_positions * read.want.bytes_per_position(read.targets.identity.vocab_size)
