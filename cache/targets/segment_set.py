"""A segment set: some fields of one teacher's targets for one corpus, shard by shard.

    <set>/zarr.json          the spec: identity, fields, encoding, corpus; created if absent
    <set>/ranks.json         names the rank table's group and hash; created if absent
    <set>/segments/<name>/   one attempt at one shard, under a name used once
    <set>/commits/<s>.json   makes one segment the shard's targets; created if absent, last
    <set>/claims/            which job is at work on which shard; only saves work
    <set>/manifest.json      all commits of a complete set, folded; created if absent

Nothing here is ever rewritten. A writer that stops anywhere, or loses the race for a commit, leaves only a segment
that no commit names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from potstill.cache.corpus import Corpus
from potstill.cache.encoding import RankTable
from potstill.cache.encoding.logprobs import check_ids
from potstill.cache.errors import TeacherFailed
from potstill.cache.store import GroupWriter, Reading, Root
from potstill.cache.store.groups import attempt_name, removed_on_failure
from potstill.cache.targets.commit import Commit, segment_path
from potstill.cache.targets.commits import Commits
from potstill.cache.targets.ranks import SetRanks
from potstill.cache.targets.segment import EncodedSegment, encode_segment, write_arrays
from potstill.cache.targets.segments import Segments, shard_text
from potstill.cache.targets.set_spec import SetSpec, SpecRecord
from potstill.cache.types import Provenance, Targets


class SegmentSet:
    """One segment set: it writes shards itself, and is read through its parts; thread-safe."""

    def __init__(self, record: SpecRecord, reading: Reading) -> None:
        self._record = record
        self.root = record.root
        self.path = record.path
        self.corpus = record.corpus
        self.spec = record.spec
        self.ranks = SetRanks(record)
        self.commits = Commits(record)
        self.segments = Segments(record, self.commits, self.ranks, reading)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address, with the spec that it was opened or planned with."""
        return type(self), (self._record, self.segments.reading)

    @classmethod
    def open(cls, root: Root, path: str, corpus: Corpus, reading: Reading) -> SegmentSet | None:
        """Open the set at `path`; None when nothing is stored there.

        Raises:
            SpecMismatch: it was made for another corpus of this name. FormatError, CorruptSegment: its spec is damaged.
        """
        record = SpecRecord.open(root, path, corpus)
        return None if record is None else cls(record, reading)

    @classmethod
    def plan(cls, root: Root, path: str, corpus: Corpus, spec: SetSpec, reading: Reading) -> SegmentSet:
        """Plan a set to fill; nothing is stored before its rank table or a shard is."""
        return cls(SpecRecord(root, path, corpus, spec), reading)

    def write_shard(self, shard: int, targets: Targets, provenance: Provenance, still_mine: Callable[[], bool]) -> bool:
        """Store a shard's targets and commit them; False when the shard is another writer's.

        `still_mine` is called right before the commit: a writer that stalled past its claim gives up there.

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted.
            TeacherFailed: the targets are impossible (NaN, unsorted, ids over the vocabulary), or have another K.
            SpecMismatch: another job made the set with another spec meanwhile.
        """
        expected = int(np.diff(self.corpus.shard_starts[shard : shard + 2])[0])
        assert targets.num_positions == expected, f"shard {shard} has {expected} positions"
        if targets.k != self.spec.fields.k:
            raise TeacherFailed(f"the teacher answered k={targets.k}, {self.path} keeps k={self.spec.fields.k}")
        check_ids(targets, self.spec.identity.vocab_size)
        self._record.publish()
        if self.ranks.lack():
            self.ranks.make(targets)

        def encode(ranks: RankTable) -> EncodedSegment:
            return encode_segment(targets, self.spec.fields, self.spec.encoding, ranks, shard_text(self.corpus, shard))

        return self.write_encoded(shard, encode, provenance, still_mine)

    def write_encoded(
        self,
        shard: int,
        encode: Callable[[RankTable], EncodedSegment],
        provenance: Provenance,
        still_mine: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Store arrays made by `encode` as a shard's targets, as `write_shard` does; the rank table must exist.

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted. What `encode` raises.
            SpecMismatch: the set was deleted meanwhile.
        """
        self._record.publish()
        segment = attempt_name(f"{shard:06d}")
        path = segment_path(self.path, segment)
        with removed_on_failure(self.root, path):
            commit = self._write_segment(shard, segment, encode, provenance)
            mine = still_mine()
            # A set that was deleted while this shard was encoded must not get a commit.
            self._record.require_unchanged()
        # From here on a commit may name the segment, also when `create` raises: it is not ours to delete.
        if mine and self.commits.create(commit):
            return True
        self.root.delete(path)
        return False

    def _write_segment(
        self, shard: int, segment: str, encode: Callable[[RankTable], EncodedSegment], provenance: Provenance
    ) -> Commit:
        ranks = self.ranks.table()
        encoded = encode(ranks)
        writer = GroupWriter(self.root, segment_path(self.path, segment))
        write_arrays(writer, encoded.arrays)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Commit(
            shard=shard,
            segment=segment,
            spec_sha256=self._record.sha256,
            ranks_sha256=ranks.sha256 if self._record.stores_ids else "",
            objects=writer.finish(),
            provenance=replace(provenance, captured_at=now),
            error=encoded.error,
        )
