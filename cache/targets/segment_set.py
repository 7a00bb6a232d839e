"""A segment set: some fields of one teacher's targets for one corpus, shard by shard.

    <set>/zarr.json          the spec: identity, fields, encoding, corpus; created if absent
    <set>/ranks.json         names the rank table's group and hash; created if absent
    <set>/segments/<name>/   one attempt at one shard, under a name used once
    <set>/commits/<s>.json   makes one segment the shard's targets; created if absent, last
    <set>/claims/            who is at work on which shard; decides nothing
    <set>/manifest.json      all commits of a complete set, folded; created if absent

Nothing here is ever rewritten. A writer that stops anywhere, or loses the race for a commit, leaves
only a segment that no commit names.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.corpus import Corpus
from potstill.cache.encoding.logprobs import RankTable, check_ids
from potstill.cache.errors import CorruptSegment, FormatError, NotCommitted, SpecMismatch, TeacherFailed
from potstill.cache.store.groups import GroupReader, GroupWriter, Reading, attempt_name, removed_on_failure
from potstill.cache.store.record import group_metadata, read_record
from potstill.cache.store.root import Root
from potstill.cache.targets.commit import Commit, commit_bytes, commit_from_json, commit_name, shard_of_commit
from potstill.cache.targets.manifest import Manifest, fold
from potstill.cache.targets.packed import Text
from potstill.cache.targets.ranks import create_ranks, make_table, pilot_rows, read_ranks
from potstill.cache.targets.segment import EncodedSegment, SegmentReader, encode_segment, write_arrays
from potstill.cache.targets.set_spec import SetSpec, parse_spec, require_same
from potstill.cache.types import Provenance, Targets

# About 27 KB each; opening one again costs some milliseconds.
_OPEN_SEGMENTS = 512
_READ_AT_ONCE = 16


class SegmentSet:
    """Read and write one segment set. Safe to share between threads."""

    def __init__(self, root: Root, path: str, corpus: Corpus, spec: SetSpec, reading: Reading) -> None:
        self.path = path
        self.corpus = corpus
        self.spec = spec
        self.root = root
        self._reading = reading
        self._commits: dict[int, Commit] = {}
        self._readers: OrderedDict[int, SegmentReader] = OrderedDict()
        self._readers_lock = threading.Lock()
        self._ranks: RankTable | None = None
        self._manifest: Manifest | None = None
        self._spec_sha256 = ""

    @classmethod
    def open(cls, root: Root, path: str, corpus: Corpus, reading: Reading) -> SegmentSet | None:
        """Open what is stored at `path`, or None when nothing is.

        Raises:
            SpecMismatch: it was made for another corpus of this name. FormatError, CorruptSegment: a damaged spec.
        """
        data = root.get(f"{path}/zarr.json")
        if data is None:
            return None
        opened = cls(root, path, corpus, parse_spec(path, data, corpus), reading)
        opened._spec_sha256 = hashlib.sha256(data).hexdigest()
        return opened

    @property
    def claims_path(self) -> str:
        """Where the claims of jobs that fill this set live, below the root."""
        return f"{self.path}/claims"

    @property
    def committed(self) -> NDArray[np.bool_]:
        """[S] which shards have a commit right now; a query of the store unless all have.

        Raises:
            SpecMismatch: another job made the set with another spec since it was planned; so does `commit_of`.
        """
        done = np.zeros(self.corpus.num_shards, dtype=bool)
        if not self._is_begun():
            return done
        if self._folded() is not None:
            return ~done
        for name in self.root.objects(f"{self.path}/commits"):
            shard = shard_of_commit(name)
            if shard is not None and shard < len(done):
                done[shard] = True
        return done

    def commit_of(self, shard: int) -> Commit | None:
        """The commit of a shard, or None. Commits never change, so a found one is remembered."""
        if shard not in self._commits:
            if not self._is_begun():
                return None
            manifest = self._folded()
            found = self._read_commit(shard) if manifest is None else manifest.commits(shard, shard + 1)[0]
            if found is None:
                return None
            self._commits[shard] = found
        return self._commits[shard]

    @property
    def remembered(self) -> list[int]:
        """Shards whose commit is not asked for again, though somebody may have deleted it since."""
        return list(self._commits)

    def require_commit(self, shard: int) -> Commit:
        """The commit of a shard.

        Raises:
            NotCommitted: there is none.
        """
        commit = self.commit_of(shard)
        if commit is None:
            raise NotCommitted(
                f"shard {shard} of corpus {self.corpus.name!r} has no targets in {self.path} yet; "
                f"run `potstill prefill` or `fill` with {self.spec.fill_options}"
            )
        return commit

    def commits(self) -> list[Commit]:
        """Every commit there is, by shard."""
        manifest = self._folded()
        if manifest is not None:
            return manifest.commits(0, self.corpus.num_shards)
        # A commit is a small object: on an object store nearly all of the time is waiting.
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            found = list(pool.map(self.commit_of, np.flatnonzero(self.committed).tolist()))
        return [commit for commit in found if commit is not None]

    def reader(self, shard: int) -> SegmentReader:
        """Reads a committed shard.

        Raises:
            NotCommitted: the shard has no commit. CorruptSegment, FormatError: stored bytes are not the committed ones.
        """
        with self._readers_lock:
            reader = self._readers.get(shard)
            if reader is not None:
                self._readers.move_to_end(shard)
                return reader
        # Two threads may open the same segment; both readers are right.
        reader = self._open_segment(shard)
        with self._readers_lock:
            self._readers[shard] = reader
            while len(self._readers) > _OPEN_SEGMENTS:
                self._readers.popitem(last=False)
        return reader

    def pilot_rows(self) -> list[int]:
        """Rows to score before anything is written; none when the rank table exists or no ids are stored."""
        if not self._stores_ids or self._read_ranks() is not None:
            return []
        return pilot_rows(self.corpus, self.spec.fields)

    def make_ranks(self, pilot: Targets) -> None:
        """Make the rank table of the pilot rows' targets, unless another writer was faster.

        Raises:
            TeacherFailed: an id over the vocabulary. StoreError: the store is full or cannot be written.
        """
        if not self._stores_ids:
            return
        table = make_table(self.corpus, pilot, self.spec.identity.vocab_size)
        self._publish_spec()
        create_ranks(self.root, self.path, table)

    def write_shard(self, shard: int, targets: Targets, provenance: Provenance, still_mine: Callable[[], bool]) -> bool:
        """Store a shard's targets and commit them; False when the shard is another writer's.

        `still_mine` is asked right before the commit: a writer that stalled past its claim loses there.

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted.
            TeacherFailed: the targets are not a teacher's (NaN, unsorted, ids over the vocabulary) or of another k.
            SpecMismatch: another job made the set with another spec meanwhile.
        """
        expected = int(np.diff(self.corpus.shard_starts[shard : shard + 2])[0])
        assert targets.num_positions == expected, f"shard {shard} has {expected} positions"
        if targets.k != self.spec.fields.k:
            raise TeacherFailed(f"the teacher answered k={targets.k}, {self.path} keeps k={self.spec.fields.k}")
        check_ids(targets, self.spec.identity.vocab_size)
        self._publish_spec()
        if self._stores_ids and self._read_ranks() is None:
            self.make_ranks(targets)

        def encode(ranks: RankTable) -> EncodedSegment:
            return encode_segment(targets, self.spec.fields, self.spec.encoding, ranks, self._text(shard))

        return self.write_encoded(shard, encode, provenance, still_mine)

    def write_encoded(
        self,
        shard: int,
        encode: Callable[[RankTable], EncodedSegment],
        provenance: Provenance,
        still_mine: Callable[[], bool] = lambda: True,
    ) -> bool:
        """`write_shard` with arrays that `encode` gives, once the rank table is there (`make_ranks`).

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted. What `encode` raises.
            SpecMismatch: the set was deleted meanwhile.
        """
        self._publish_spec()
        segment = attempt_name(f"{shard:06d}")
        path = self.segment_path(segment)
        with removed_on_failure(self.root, path):
            commit = self._write_segment(shard, segment, encode, provenance)
            mine = still_mine()
            self._require_own_spec()
        # From here on a commit may name the segment, also when `create` raises: it is not ours to delete.
        if mine and self.root.create(f"{self.path}/commits/{commit_name(shard)}", commit_bytes(commit)):
            self._commits[shard] = commit
            return True
        self.root.delete(path)
        return False

    def fold(self) -> bool:
        """Fold the commits of a complete set into a manifest; whether this call did.

        The commits are read again, and looked at again when the manifest is there: one of them may be deleted and
        its shard filled anew at any time, and a manifest of what was there before would bring it back.

        Raises:
            StoreError: the store is full or cannot be written. CorruptSegment, FormatError: a damaged commit.
        """
        if self._folded() is not None or not self.committed.all():
            return False
        before = self.root.versions(f"{self.path}/commits")
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            found = list(pool.map(self._read_commit, range(self.corpus.num_shards)))
        commits = [commit for commit in found if commit is not None]
        if len(commits) < len(found) or not fold(self.root, self.path, commits):
            return False
        if self.root.versions(f"{self.path}/commits") != before:
            self.root.remove(f"{self.path}/manifest.json")
            return False
        return True

    def segment_path(self, segment: str) -> str:
        """Where a segment lives below the root."""
        return f"{self.path}/segments/{segment}"

    def corrupt_objects(self, shard: int) -> list[str]:
        """One line per object of a committed shard that is not what was committed, its commit included.

        Raises:
            NotCommitted: the shard has no commit.
        """
        found = []
        try:
            found += self._committed_group(shard).corrupt_objects()
            if self._manifest is not None and not self._manifest.holds(shard, self._read_commit(shard)):
                found.append(f"{self.path}/commits/{commit_name(shard)} is not the commit that the manifest has")
            self._open_segment(shard)
        except (CorruptSegment, FormatError) as error:
            found.append(error.detail)
        return found

    def corrupt_shared_objects(self) -> list[str]:
        """The same for what belongs to no one shard: the rank table and the manifest."""
        found = []
        try:
            self._ranks = None
            self._read_ranks()
            manifest = self._folded()
            found += [] if manifest is None else manifest.corrupt_objects()
        except (CorruptSegment, FormatError) as error:
            found.append(error.detail)
        return found

    @property
    def _stores_ids(self) -> bool:
        return bool(self.spec.fields.k or self.spec.fields.draws)

    def _folded(self) -> Manifest | None:
        if self._manifest is None:
            self._manifest = Manifest.open(self.root, self.path, self.corpus.num_shards)
        return self._manifest

    def _read_commit(self, shard: int) -> Commit | None:
        path = f"{self.path}/commits/{commit_name(shard)}"
        record = read_record(self.root, path, "commit")
        return None if record is None else commit_from_json(path, shard, record)

    def _write_segment(
        self, shard: int, segment: str, encode: Callable[[RankTable], EncodedSegment], provenance: Provenance
    ) -> Commit:
        ranks = self._ranks_or_plain()
        encoded = encode(ranks)
        writer = GroupWriter(self.root, self.segment_path(segment))
        write_arrays(writer, encoded.arrays)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Commit(
            shard=shard,
            segment=segment,
            spec_sha256=self._spec_sha256,
            ranks_sha256=ranks.sha256 if self._stores_ids else "",
            objects=writer.finish(),
            provenance=replace(provenance, captured_at=now),
            error=encoded.error,
        )

    def _open_segment(self, shard: int) -> SegmentReader:
        return SegmentReader(
            self._open_group(shard),
            fields=self.spec.fields,
            encoding=self.spec.encoding,
            ranks=self._ranks_or_plain(),
            text=self._text(shard),
            reading=self._reading,
        )

    def _text(self, shard: int) -> Text:
        low, high = (int(p) for p in self.corpus.shard_starts[shard : shard + 2])
        first, last = (int(row) for row in self.corpus.shard_rows[shard : shard + 2])
        return Text(
            num_positions=high - low,
            tokens=lambda start, stop: self.corpus.tokens(low + start, low + stop),
            row_starts=lambda: self.corpus.starts(first, last) - low,
        )

    def _open_group(self, shard: int) -> GroupReader:
        group, commit = self._committed_group(shard), self.commit_of(shard)
        if commit is not None and self._stores_ids and self._ranks_or_plain().sha256 != commit.ranks_sha256:
            raise CorruptSegment(f"{self.path}: the rank table is not the one that shard {shard} was written with")
        return group

    def _committed_group(self, shard: int) -> GroupReader:
        commit = self.require_commit(shard)
        if commit.spec_sha256 and commit.spec_sha256 != self._spec_sha256:
            raise CorruptSegment(f"{self.path}/commits/{commit_name(shard)} is the commit of another segment set")
        return GroupReader(self.root, self.segment_path(commit.segment), commit.objects, self._reading)

    def _require_own_spec(self) -> None:
        data = self.root.get(f"{self.path}/zarr.json")
        if data is None or hashlib.sha256(data).hexdigest() != self._spec_sha256:
            raise SpecMismatch(
                f"{self.path} was deleted while it was filled; run the same command again to fill it anew"
            )

    def _publish_spec(self) -> None:
        if self._is_begun():
            return
        record = {
            "teacher": self.path.split("/")[1],
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "identity": self.spec.identity.to_json(),
            "fields": self.spec.fields.to_json(),
            "encoding": self.spec.encoding.to_json(),
        }
        self.root.create(f"{self.path}/zarr.json", group_metadata("targets", record))
        begun = self._is_begun()
        assert begun, "a created spec cannot vanish"

    def _is_begun(self) -> bool:
        """Whether the set's record is there; refuses one that another job made of another spec since it was planned."""
        if not self._spec_sha256:
            data = self.root.get(f"{self.path}/zarr.json")
            if data is None:
                return False
            require_same(self.path, self.spec, parse_spec(self.path, data, self.corpus))
            self._spec_sha256 = hashlib.sha256(data).hexdigest()
        return True

    def _ranks_or_plain(self) -> RankTable:
        if not self._stores_ids:
            return RankTable.plain(self.spec.identity.vocab_size)
        ranks = self._read_ranks()
        if ranks is None:
            raise CorruptSegment(f"{self.path}/ranks.json is missing, and its segments were written with a rank table")
        return ranks

    def _read_ranks(self) -> RankTable | None:
        if self._ranks is None:
            self._ranks = read_ranks(self.root, self.path, self.spec.identity.vocab_size)
        return self._ranks
