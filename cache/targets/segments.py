"""Readers of the committed segments of one segment set; those in use stay open."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from potstill.cache.corpus import Corpus
from potstill.cache.errors import CorruptSegment
from potstill.cache.store import GroupReader, Reading
from potstill.cache.targets.commit import commit_name, segment_path
from potstill.cache.targets.commits import Commits
from potstill.cache.targets.packed import Text
from potstill.cache.targets.ranks import SetRanks
from potstill.cache.targets.segment import SegmentReader
from potstill.cache.targets.set_spec import SpecRecord

# About 27 KB each; opening one again costs some milliseconds.
_OPEN_SEGMENTS = 512


class Segments:
    """Readers of committed segments by shard, of which the least recently used are closed; thread-safe.

    Methods that take a shard raise NotCommitted when it has no commit, and CorruptSegment or FormatError when its
    stored bytes are not the committed ones.
    """

    def __init__(self, record: SpecRecord, commits: Commits, ranks: SetRanks, reading: Reading) -> None:
        self._record = record
        self._commits = commits
        self._ranks = ranks
        self.reading = reading
        self.reader: Callable[[int], SegmentReader]
        """Reader of a shard, which stays open for the next call. Two threads may open the same one: both are right."""
        self._close_all()

    def are_gone(self, shards: Iterable[int]) -> bool:
        """Tell whether the commit of a shard was withdrawn or deleted since it was read; then it is forgotten."""
        gone = [shard for shard in shards if self._commits.is_gone(shard)]
        if gone:
            self._close_all()
        return bool(gone)

    def _close_all(self) -> None:
        self.reader = lru_cache(_OPEN_SEGMENTS)(self.open)

    def open(self, shard: int) -> SegmentReader:
        """Open a new reader of a shard."""
        group, commit, table = self.group(shard), self._commits.require(shard), self._ranks.table()
        if self._record.stores_ids and table.sha256 != commit.ranks_sha256:
            path = self._record.path
            raise CorruptSegment(f"{path}: the rank table is not the one that shard {shard} was written with")
        spec = self._record.spec
        text = shard_text(self._record.corpus, shard)
        return SegmentReader(
            group, fields=spec.fields, encoding=spec.encoding, ranks=table, text=text, reading=self.reading
        )

    def group(self, shard: int) -> GroupReader:
        """Open the stored arrays of a shard, without a check that the rank table is theirs."""
        commit, path = self._commits.require(shard), self._record.path
        if commit.spec_sha256 and commit.spec_sha256 != self._record.sha256:
            raise CorruptSegment(f"{path}/commits/{commit_name(shard)} is the commit of another segment set")
        return GroupReader(self._record.root, segment_path(path, commit.segment), commit.objects, self.reading)


def shard_text(corpus: Corpus, shard: int) -> Text:
    """Rows of a shard, positions counted from its start."""
    low, high = (int(position) for position in corpus.shard_starts[shard : shard + 2])
    first, last = (int(row) for row in corpus.shard_rows[shard : shard + 2])
    return Text(
        num_positions=high - low,
        tokens=lambda start, stop: corpus.tokens(low + start, low + stop),
        row_starts=lambda: corpus.starts(first, last) - low,
    )
