"""A target set: one teacher's targets for one corpus, shard by shard.

    targets/<teacher>/<corpus>/zarr.json          the spec: identity, fields, encoding, corpus; created if absent
    targets/<teacher>/<corpus>/ranks.json         names the rank table's group and hash; created if absent
    targets/<teacher>/<corpus>/segments/<name>/   one attempt at one shard, under a name used once
    targets/<teacher>/<corpus>/commits/<s>.json   makes one segment the shard's targets; created if absent, last

Nothing here is ever rewritten. A writer that stops anywhere, or loses the race for a commit, leaves
only a segment that no commit names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.commit import Commit, commit_bytes, commit_from_json, commit_name, shard_of_commit
from cache.corpus import Corpus
from cache.encoding import Encoding, RankTable, check_ids, encode_measured, encoding_by_name
from cache.errors import CorruptSegment, FormatError, InvalidInput, NotCommitted, SpecMismatch, UnknownTeacher
from cache.groups import GroupReader, GroupWriter, Layout, attempt_name, objects_from_json, objects_to_json
from cache.record import group_metadata, read_group_metadata, read_record, record_bytes
from cache.segment import SegmentReader, write_targets
from cache.store import Root, check_name
from cache.types import Fields, Provenance, Targets, TeacherIdentity

_PILOT_POSITIONS = 65_536
# About 27 KB each; opening one again costs some milliseconds.
_OPEN_SEGMENTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What one target set holds; another spec under the same names is refused."""

    identity: TeacherIdentity
    fields: Fields
    encoding: Encoding


class TargetSet:
    """Read, and in mode `r+` write, one teacher's targets for one corpus. Safe to share between threads."""

    def __init__(self, root: Root, teacher: str, corpus: Corpus, spec: TargetSpec) -> None:
        self.teacher = teacher
        self.corpus = corpus
        self.spec = spec
        self._root = root
        self._path = targets_path(teacher, corpus.name)
        self._commits: dict[int, Commit] = {}
        self._readers: OrderedDict[int, SegmentReader] = OrderedDict()
        self._ranks: RankTable | None = None
        self._published = False

    @classmethod
    def open(cls, root: Root, teacher: str, corpus: Corpus) -> TargetSet:
        """Open what is there.

        Raises:
            UnknownTeacher: the teacher has no targets for this corpus.
            SpecMismatch: they were made for another corpus of this name.
        """
        path = targets_path(teacher, corpus.name)
        spec = _read_spec(root, path, corpus)
        if spec is None:
            raise UnknownTeacher(f"teacher {teacher!r} has no targets for corpus {corpus.name!r} in {root.url}")
        opened = cls(root, teacher, corpus, spec)
        opened._published = True
        return opened

    @classmethod
    def plan(cls, root: Root, teacher: str, corpus: Corpus, spec: TargetSpec) -> TargetSet:
        """Open for writing; nothing is stored before the first shard is.

        Raises:
            SpecMismatch: the set exists with another identity, field set or encoding, or the teacher's
                tokenizer or vocabulary does not fit the corpus.
        """
        _check_fits(teacher, corpus, spec.identity)
        planned = cls(root, teacher, corpus, spec)
        found = _read_spec(root, planned._path, corpus)
        if found is not None:
            _require_same(planned._path, spec, found)
            planned._published = True
        return planned

    @property
    def identity(self) -> TeacherIdentity:
        """Whose targets these are."""
        return self.spec.identity

    @property
    def fields(self) -> Fields:
        """What is kept of each position."""
        return self.spec.fields

    @property
    def encoding(self) -> Encoding:
        """How logprobs are kept."""
        return self.spec.encoding

    @property
    def committed(self) -> NDArray[np.bool_]:
        """[S] which shards have a commit right now; a query of the store at every call."""
        done = np.zeros(self.corpus.num_shards, dtype=bool)
        for name in self._root.objects(f"{self._path}/commits"):
            shard = shard_of_commit(name)
            if shard is not None and shard < len(done):
                done[shard] = True
        return done

    def commit_of(self, shard: int) -> Commit | None:
        """The commit of a shard, or None. Commits never change, so a found one is remembered."""
        if shard not in self._commits:
            path = f"{self._path}/commits/{commit_name(shard)}"
            record = read_record(self._root, path, "commit")
            if record is None:
                return None
            self._commits[shard] = commit_from_json(path, shard, record)
        return self._commits[shard]

    def commits(self) -> list[Commit]:
        """Every commit there is, by shard."""
        found = (self.commit_of(int(shard)) for shard in np.flatnonzero(self.committed))
        return [commit for commit in found if commit is not None]

    def read(self, start: int, stop: int, *, k: int | None = None) -> Targets:
        """Targets of positions `start` to `stop`; of each the top `k`, all that is kept by default.

        Raises:
            InvalidInput: a range outside the corpus. UnsupportedField: `k` over what is kept.
            NotCommitted: a position whose shard has no commit. CorruptSegment: stored bytes are damaged.
        """
        if not 0 <= start < stop <= self.corpus.num_positions:
            raise InvalidInput(
                f"positions {start} to {stop} are outside corpus {self.corpus.name!r} "
                f"of {self.corpus.num_positions} positions"
            )
        starts = self.corpus.shard_starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        parts = []
        for shard in range(first, self.corpus.num_shards):
            low, high = int(starts[shard]), int(starts[shard + 1])
            if low >= stop:
                break
            reader = self._reader(shard)
            parts.append(reader.read(max(start, low) - low, min(stop, high) - low))
        return Targets.concat(parts).prefix(self.fields.k if k is None else k)

    def read_rows(self, rows: Sequence[int], *, k: int | None = None) -> list[Targets]:
        """One `Targets` per row index, in order; raises as `read` does."""
        starts = self.corpus.row_starts
        for row in rows:
            if not 0 <= row < len(self.corpus):
                raise InvalidInput(f"row {row} is outside corpus {self.corpus.name!r} of {len(self.corpus)} rows")
        return [self.read(int(starts[row]), int(starts[row + 1]), k=k) for row in rows]

    def write_shard(self, shard: int, targets: Targets, provenance: Provenance) -> Commit | None:
        """Store a shard's targets and commit them; None when another writer committed the shard first.

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted.
            TeacherFailed: the targets are not a teacher's (NaN, unsorted, ids over the vocabulary).
        """
        expected = int(np.diff(self.corpus.shard_starts[shard : shard + 2])[0])
        assert targets.num_positions == expected, f"shard {shard} has {expected} positions"
        check_ids(targets, self.identity.vocab_size)
        self._publish_spec()
        ranks = self._rank_table(targets)
        segment = attempt_name(f"{shard:06d}")
        path = f"{self._path}/segments/{segment}"
        try:
            commit = self._write_segment(shard, segment, path, targets, ranks, provenance)
        except BaseException:
            self._root.delete(path)
            raise
        # From here on a commit may name the segment, also when `create` raises: it is not ours to delete.
        if self._root.create(f"{self._path}/commits/{commit_name(shard)}", commit_bytes(commit)):
            self._commits[shard] = commit
            return commit
        self._root.delete(path)
        return None

    def segment_names(self) -> list[str]:
        """Every segment stored, committed or not."""
        return self._root.folders(f"{self._path}/segments")

    def segment_path(self, segment: str) -> str:
        """Where a segment lives below the root."""
        return f"{self._path}/segments/{segment}"

    def corrupt_objects(self, shard: int) -> list[str]:
        """One line per object of a committed shard that is not what was committed.

        Raises:
            NotCommitted: the shard has no commit. FormatError: it has one that cannot be read.
        """
        try:
            return self._open_group(shard).corrupt_objects()
        except CorruptSegment as error:
            return [error.detail]

    def _write_segment(
        self, shard: int, segment: str, path: str, targets: Targets, ranks: RankTable, provenance: Provenance
    ) -> Commit:
        stored, error = encode_measured(targets, self.encoding, ranks)
        writer = GroupWriter(self._root, path)
        write_targets(writer, stored)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Commit(
            shard=shard,
            segment=segment,
            ranks_sha256=ranks.sha256,
            objects=writer.finish(),
            provenance=replace(provenance, captured_at=now),
            error=error.to_json(),
        )

    def _reader(self, shard: int) -> SegmentReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = self._open_segment(shard)
            if len(self._readers) > _OPEN_SEGMENTS:
                # Another thread may have been faster; then there is nothing left to close.
                with suppress(KeyError):
                    self._readers.popitem(last=False)
        return reader

    def _open_segment(self, shard: int) -> SegmentReader:
        low, high = (int(p) for p in self.corpus.shard_starts[shard : shard + 2])
        group = self._open_group(shard)
        ranks = self._read_ranks()
        assert ranks is not None, "checked when the group was opened"
        return SegmentReader(group, high - low, self.fields.k, self.encoding, ranks)

    def _open_group(self, shard: int) -> GroupReader:
        commit = self.commit_of(shard)
        if commit is None:
            raise NotCommitted(
                f"shard {shard} of corpus {self.corpus.name!r} has no targets of teacher {self.teacher!r} yet; "
                "run `potstill prefill` for it"
            )
        ranks = self._read_ranks()
        if ranks is None:
            raise CorruptSegment(f"{self._path}/ranks.json is missing, and shard {shard} was written with a rank table")
        if ranks.sha256 != commit.ranks_sha256:
            raise CorruptSegment(f"{self._path}: the rank table is not the one that shard {shard} was written with")
        return GroupReader(self._root, self.segment_path(commit.segment), commit.objects)

    def _publish_spec(self) -> None:
        if self._published:
            return
        record = {
            "teacher": self.teacher,
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "identity": self.identity.to_json(),
            "fields": self.fields.to_json(),
            "encoding": self.encoding.to_json(),
        }
        if not self._root.create(f"{self._path}/zarr.json", group_metadata("targets", record)):
            found = _read_spec(self._root, self._path, self.corpus)
            assert found is not None, "a created spec cannot vanish"
            _require_same(self._path, self.spec, found)
        self._published = True

    def _rank_table(self, scored: Targets) -> RankTable:
        """The set's rank table; the first shard that is written makes it, of its own top-k ids."""
        ranks = self._read_ranks()
        if ranks is not None:
            return ranks
        tokens = self.corpus.tokens(0, min(self.corpus.num_positions, _PILOT_POSITIONS))
        made = RankTable.by_frequency(scored.ids[:_PILOT_POSITIONS], tokens, self.identity.vocab_size)
        group = attempt_name("ranks")
        writer = GroupWriter(self._root, f"{self._path}/{group}")
        writer.write("ids_by_rank", made.ids_by_rank, Layout((1 << 16,)))
        record = {"group": group, "sha256": made.sha256, "objects": objects_to_json(writer.finish())}
        if not self._root.create(f"{self._path}/ranks.json", record_bytes("ranks", record)):
            self._root.delete(f"{self._path}/{group}")
        ranks = self._read_ranks()
        assert ranks is not None, "a created rank table cannot vanish"
        return ranks

    def _read_ranks(self) -> RankTable | None:
        if self._ranks is None:
            record = read_record(self._root, f"{self._path}/ranks.json", "ranks")
            if record is None:
                return None
            self._ranks = _ranks_from_json(self._root, self._path, record, self.identity.vocab_size)
        return self._ranks


def targets_path(teacher: str, corpus: str) -> str:
    """Where a target set lives below the root."""
    return f"targets/{check_name('teacher', teacher)}/{check_name('corpus', corpus)}"


def target_set_paths(root: Root) -> list[str]:
    """Where every target set lives, complete or not."""
    return [
        f"targets/{teacher}/{corpus}"
        for teacher in root.folders("targets")
        for corpus in root.folders(f"targets/{teacher}")
    ]


def has_targets(root: Root, teacher: str, corpus: str) -> bool:
    """Whether a teacher's target set for a corpus was begun."""
    return root.get(f"{targets_path(teacher, corpus)}/zarr.json") is not None


def _check_fits(teacher: str, corpus: Corpus, identity: TeacherIdentity) -> None:
    if identity.tokenizer_sha256 != corpus.tokenizer_sha256:
        raise SpecMismatch(
            f"teacher {teacher!r} has tokenizer {identity.tokenizer_sha256[:12]}, corpus {corpus.name!r} was made with "
            f"{corpus.tokenizer_sha256[:12]}; ingest the text again with the teacher's tokenizer"
        )
    if corpus.spec.max_token_id >= identity.vocab_size:
        raise SpecMismatch(
            f"corpus {corpus.name!r} has token id {corpus.spec.max_token_id}, teacher {teacher!r} knows "
            f"{identity.vocab_size} ids; ingest the text again with the teacher's tokenizer"
        )


def _read_spec(root: Root, path: str, corpus: Corpus) -> TargetSpec | None:
    record = read_group_metadata(root, path, "targets")
    if record is None:
        return None
    try:
        spec = TargetSpec(
            identity=TeacherIdentity.from_json(record["identity"]),
            fields=Fields.from_json(record["fields"]),
            encoding=encoding_by_name(record["encoding"]["name"]),
        )
        fingerprint = record["corpus"]["fingerprint"]
    except (KeyError, TypeError, InvalidInput) as error:
        raise FormatError(f"{path}/zarr.json is not the record of a target set: {error}") from error
    if fingerprint != corpus.fingerprint:
        raise SpecMismatch(
            f"{path} was made for a corpus {corpus.name!r} of fingerprint {fingerprint[:12]}, "
            f"this one has {corpus.fingerprint[:12]}; use another corpus name"
        )
    return spec


def _require_same(path: str, wanted: TargetSpec, found: TargetSpec) -> None:
    differences = found.identity.differences(wanted.identity)
    for name in ("fields", "encoding"):
        mine, theirs = getattr(found, name).to_json(), getattr(wanted, name).to_json()
        if mine != theirs:
            changed = [f"{key}: {mine[key]} != {theirs[key]}" for key in mine if mine[key] != theirs[key]]
            differences += ("; " if differences else "") + f"{name}: {', '.join(changed)}"
    if differences:
        raise SpecMismatch(f"{path} exists with another spec ({differences}); use another teacher name")


def _ranks_from_json(root: Root, path: str, record: dict[str, Any], vocab_size: int) -> RankTable:
    try:
        group = check_name("rank table", record["group"])
        reader = GroupReader(root, f"{path}/{group}", objects_from_json(record["objects"]))
        expected = str(record["sha256"])
    except (KeyError, TypeError, ValueError, InvalidInput) as error:
        raise FormatError(f"{path}/ranks.json is not the record of a rank table: {error}") from error
    reader.expect("ids_by_rank", (vocab_size,), ("uint32",))
    ranks = RankTable(reader.read_all("ids_by_rank").astype(np.uint32, copy=False))
    if ranks.sha256 != expected or not np.array_equal(np.sort(ranks.ids_by_rank), np.arange(vocab_size)):
        raise CorruptSegment(f"{reader.path}/ids_by_rank is not the permutation that ranks.json recorded")
    return ranks
