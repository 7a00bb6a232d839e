"""A target set: one teacher's targets for one corpus, in one or more segment sets.

    targets/<teacher>/<corpus>/              the segment set that was made first
    targets/<teacher>/<corpus>/sets/<name>/  fields that were added later

A reader sees the fields of all sets together; a writer fills those sets that lack a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.encoding import Encoding, load_compiled
from potstill.cache.encoding.fields import check_kept
from potstill.cache.errors import CorruptSegment, NotCommitted, SpecMismatch, UnknownTeacher, UnsupportedField
from potstill.cache.fields import COLUMNS
from potstill.cache.store import Reading, Root
from potstill.cache.store.root import check_name
from potstill.cache.targets.commit import Commit
from potstill.cache.targets.ranks import pilot_rows
from potstill.cache.targets.segment import SegmentRange, read_segment_ranges
from potstill.cache.targets.segment_set import SegmentSet
from potstill.cache.targets.set_spec import SetSpec, require_same
from potstill.cache.targets.unshared_ids import UnsharedIds, unshared_ids
from potstill.cache.types import Fields, Provenance, Targets, TeacherIdentity
from potstill.cache.wanted import holders, wanted_fields

# Rows that are read and decoded together: enough to spread the cost per call, few enough to bound memory.
_MANY_ROWS = 256


class TargetSet:
    """One teacher's targets for one corpus, for reading, and in mode `r+` for writing; thread-safe."""

    def __init__(self, teacher: str, corpus: Corpus, sets: Sequence[SegmentSet]) -> None:
        assert sets, "a target set has at least one segment set"
        self.teacher = teacher
        self.corpus = corpus
        self.sets = tuple(sets)

    @classmethod
    def open(cls, root: Root, teacher: str, corpus: Corpus, reading: Reading) -> TargetSet:
        """Open all segment sets that exist.

        Raises:
            UnknownTeacher: the teacher has no targets for this corpus.
            SpecMismatch: they were made for another corpus of this name.
        """
        sets = _open_sets(root, teacher, corpus, reading)
        if not sets:
            known = ", ".join(teachers_with_targets(root, corpus.name))
            there = f"there are those of: {known}; make its own" if known else "no teacher has any yet; make them"
            raise UnknownTeacher(
                f"teacher {teacher!r} has no targets for corpus {corpus.name!r} in {root.url}; "
                f"{there} with "
                f"`potstill prefill --cache {root.url} --corpus {corpus.name} --teacher {teacher}=MODEL_OR_URL`, "
                "or by `potstill project` if it has another tokenizer"
            )
        return cls(teacher, corpus, sets)

    @classmethod
    def plan(
        cls,
        root: Root,
        teacher: str,
        corpus: Corpus,
        spec: SetSpec,
        reading: Reading,
        tokenizer: Tokenizer | None = None,
    ) -> TargetSet:
        """Plan the segment sets to fill so that the fields of `spec` are there; nothing is stored before a shard is.

        Fields that exist keep their segment set, the others get a new one. The answer has the sets that are not
        complete, or all of them when all are. With the teacher's `tokenizer` one that differs from the corpus's only in
        ids that no row uses is no obstacle; once such a set is there, it is none without, either.

        Raises:
            SpecMismatch: the teacher has another identity, a field exists with other settings or another encoding, or
                the teacher's tokenizer or vocabulary does not fit the corpus.
            InvalidInput: the encoding has no room for so many entries or draws.
        """
        check_kept(spec.fields, spec.encoding)
        opened = _open_sets(root, teacher, corpus, reading)
        spec = replace(spec, unshared=_unshared(teacher, corpus, spec.identity, opened, tokenizer))
        sets = []
        missing: Fields | None = spec.fields
        for found in opened:
            left = None if missing is None else missing.without(found.spec.fields)
            held = left != missing
            # All sets must be of one teacher; encodings need to agree only where fields are shared.
            require_same(found.path, replace(found.spec, identity=spec.identity), found.spec)
            if held:
                require_same(found.path, replace(found.spec, encoding=spec.encoding), found.spec)
                sets.append(found)
            missing = left
        if missing is not None:
            # The first set lies in the target set's own folder, as in format 1, which had no others. The store is not
            # asked again: another job may have begun that set since, and this one is to join it, or to be refused.
            path = targets_path(teacher, corpus.name)
            if any(found.path == path for found in opened):
                path = f"{path}/sets/{missing.label}"
            sets.append(SegmentSet.plan(root, path, corpus, replace(spec, fields=missing), reading))
        unfinished = [each for each in sets if not each.commits.committed.all()]
        return cls(teacher, corpus, unfinished or sets)

    @property
    def root(self) -> Root:
        """Root of the cache that holds it."""
        return self.sets[0].root

    @property
    def identity(self) -> TeacherIdentity:
        """Identity of the teacher."""
        return self.sets[0].spec.identity

    @property
    def unshared(self) -> UnsharedIds:
        """Ids that mean other tokens to the teacher than to the corpus, and that no row uses."""
        return self.sets[0].spec.unshared

    @property
    def fields(self) -> Fields:
        """Fields that are kept, over all segment sets."""
        return reduce(Fields.joined, (each.spec.fields for each in self.sets))

    @property
    def encoding(self) -> Encoding:
        """Encoding of the top-k; without a top-k, that of the first segment set."""
        with_top_k = [each for each in self.sets if each.spec.fields.k]
        return (with_top_k or self.sets)[0].spec.encoding

    @property
    def committed(self) -> NDArray[np.bool_]:
        """Mask [S], True for a shard that has a commit in every segment set right now."""
        every: NDArray[np.bool_] = np.logical_and.reduce([each.commits.committed for each in self.sets])
        return every

    def is_committed(self, shard: int) -> bool:
        """Tell whether every segment set has a commit of the shard."""
        return all(each.commits.of(shard) is not None for each in self.sets)

    def top_k_only(self) -> TargetSet:
        """Reduce to the segment set with the top-k, so that uncommitted shards of other fields do not matter.

        Raises:
            UnsupportedField: no top-k is kept.
        """
        sets = [each for each in self.sets if each.spec.fields.k]
        if not sets:
            raise UnsupportedField(
                f"teacher {self.teacher!r} has no top-k for corpus {self.corpus.name!r}; "
                "run `potstill prefill` or `fill` for it"
            )
        return TargetSet(self.teacher, self.corpus, sets)

    def only(self, fields: Fields) -> TargetSet:
        """Reduce to the segment sets that hold these fields, so that uncommitted shards of others do not matter.

        Raises:
            UnsupportedField: a field is not kept.
        """
        return TargetSet(self.teacher, self.corpus, [each for each, _ in self._holders(self._wanted(None, fields))])

    def read(self, start: int, stop: int, *, k: int | None = None, fields: Fields | None = None) -> Targets:
        """Read the targets of positions `start` to `stop`.

        Args:
            start: first position.
            stop: one past the last.
            k: entries of the top-k to read, whatever `fields` says; 0 for none.
            fields: fields to read, by default all that are kept; others are not touched.

        Raises:
            InvalidInput: the range is not inside the corpus. UnsupportedField: a field is not kept.
            NotCommitted: a shard has no commit yet. CorruptSegment: stored bytes are damaged.
        """
        self.corpus.require_positions(start, stop)
        return Targets.concat(self._read_ranges(self._cut(start, stop), self._wanted(k, fields)))

    def read_rows(self, rows: Sequence[int], *, k: int | None = None, fields: Fields | None = None) -> list[Targets]:
        """Read one `Targets` per row index, in order; arguments and errors are those of `read`."""
        want = self._wanted(k, fields)
        found: list[Targets] = []
        for first in range(0, len(rows), _MANY_ROWS):
            ranges = self.corpus.row_ranges(rows[first : first + _MANY_ROWS]).tolist()
            found.extend(self._read_ranges([(start, stop) for start, stop in ranges], want))
        return found

    def load_compiled(self) -> None:
        """Load what decodes small reads faster, which takes half a second: for who makes many."""
        load_compiled()

    def commits_of(self, shards: Sequence[int], want: Fields) -> list[Commit]:
        """List the commits that hold the wanted fields of each shard, by shard and segment set; reads no target.

        Raises:
            NotCommitted: a shard has no commit yet. UnsupportedField: a field is not kept.
        """
        holders = list(self._holders(self._wanted(None, want)))
        with self._way_out():
            return [each.commits.require(shard) for shard in shards for each, _ in holders]

    def read_column(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read one of `COLUMNS`, [P], and nothing else.

        Raises:
            UnsupportedField: the column is not kept. Others as `read`.
        """
        self.corpus.require_positions(start, stop)
        holders = [each for each in self.sets if name in COLUMNS and COLUMNS[name].is_asked(each.spec.fields)]
        if not holders:
            raise UnsupportedField(
                f"{name!r} is not a column of teacher {self.teacher!r}'s targets for corpus {self.corpus.name!r}"
            )
        parts = []
        for begin, end in self._cut(start, stop):
            with self._way_out(holders[0], [(begin, end)]):
                [found] = self._in_shards(holders[0], [(begin, end)])
                parts.append(found.reader.read_column(name, found.start, found.stop))
        return np.concatenate(parts)

    def pilot_rows(self) -> list[int]:
        """Rows to score before anything is written, for `make_ranks`; empty when all rank tables exist."""
        # A pilot is scored once with the fields of all sets, so these decide how many rows fit into memory.
        return pilot_rows(self.corpus, self.fields) if any(each.ranks.lack() for each in self.sets) else []

    def make_ranks(self, pilot: Targets) -> None:
        """Make the missing rank tables from the pilot rows' targets, unless another writer is faster.

        Raises:
            TeacherFailed: an id is over the vocabulary. StoreError: the store is full or cannot be written.
        """
        for each in self.sets:
            if each.ranks.lack():
                each.ranks.make(pilot.only(each.spec.fields))

    @property
    def claims_path(self) -> str:
        """Path below the root for the claims of jobs that fill this target set."""
        return f"{self.sets[0].path}/claims"

    def write_shard(
        self,
        shard: int,
        targets: Targets,
        provenance: Provenance,
        *,
        still_mine: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Store a shard's targets and commit them; False when the shard is another writer's.

        `still_mine` is called right before each commit: a writer that stalled past its claim gives up there.

        Raises:
            StoreError: the store is full or cannot be written; the shard stays uncommitted.
            TeacherFailed: the targets are impossible (NaN, unsorted, ids over the vocabulary).
        """
        lacking = [each for each in self.sets if each.commits.of(shard) is None]
        won = [each.write_shard(shard, targets.only(each.spec.fields), provenance, still_mine) for each in lacking]
        return bool(won) and all(won)

    def fold(self) -> bool:
        """Fold the commits of complete segment sets into manifests; True when this call folded any.

        Raises:
            StoreError: the store is full or cannot be written; the commits stand.
        """
        folded = [each.commits.fold() for each in self.sets]
        return any(folded)

    def _wanted(self, k: int | None, fields: Fields | None) -> Fields:
        return wanted_fields(self.fields, k, fields, f"teacher {self.teacher!r} on corpus {self.corpus.name!r}")

    def _read_ranges(self, ranges: Sequence[tuple[int, int]], want: Fields) -> list[Targets]:
        found: list[Targets | None] = [None] * len(ranges)
        for each, part in self._holders(want) if ranges else ():
            with self._way_out(each, ranges):
                read = read_segment_ranges(self._in_shards(each, ranges), part)
            found = [new if old is None else old.with_fields_of(new) for old, new in zip(found, read, strict=True)]
        return [targets for targets in found if targets is not None]

    def _holders(self, want: Fields) -> Iterator[tuple[SegmentSet, Fields]]:
        """Segment sets that have some of the wanted fields, each with the fields to read from it."""
        kept = [each.spec.fields for each in self.sets]
        return ((self.sets[i], part) for i, part in holders(kept, want))

    @contextmanager
    def _way_out(self, segment_set: SegmentSet | None = None, ranges: Sequence[tuple[int, int]] = ()) -> Iterator[None]:
        """Add to an error of damaged bytes what to do about it; `verify` reads segment sets without this.

        When a commit of what was read from a segment set is gone meanwhile, its shard is not damaged but uncommitted.
        """
        try:
            yield
        except CorruptSegment as error:
            shards = self._shards(ranges)
            if segment_set is not None and segment_set.segments.are_gone(shards):
                raise NotCommitted(
                    f"targets in {segment_set.path} were withdrawn or deleted while they were read; read them again"
                ) from error
            # Without the root's URL, which a service's clients need not know.
            more = "`potstill verify` of its cache tells what else is damaged and how to mend it"
            raise CorruptSegment(f"{error.detail}; {more}") from error

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut a range of positions at the ends of shards."""
        starts = self.corpus.shard_starts
        inside = starts[np.searchsorted(starts, start, side="right") : np.searchsorted(starts, stop)].tolist()
        return list(pairwise([start, *inside, stop]))

    def _shards(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Number of the shard that holds each range."""
        begun = np.searchsorted(self.corpus.shard_starts, [start for start, _ in ranges], side="right")
        shards: list[int] = (begun - 1).tolist()
        return shards

    def _in_shards(self, segment_set: SegmentSet, ranges: Sequence[tuple[int, int]]) -> list[SegmentRange]:
        """Find the places of ranges, each of which lies within one shard."""
        shards = self._shards(ranges)
        low = dict(zip(shards, self.corpus.shard_starts[shards].tolist(), strict=True))
        reader = {shard: segment_set.segments.reader(shard) for shard in low}
        return [
            SegmentRange(reader[shard], start - low[shard], stop - low[shard])
            for shard, (start, stop) in zip(shards, ranges, strict=True)
        ]


def targets_path(teacher: str, corpus: str) -> str:
    """Path of a target set below the root."""
    return f"targets/{check_name('teacher', teacher)}/{check_name('corpus', corpus)}"


def target_set_paths(root: Root) -> list[str]:
    """Paths of all target sets below the root, complete or not."""
    return [
        f"targets/{teacher}/{corpus}"
        for teacher in root.folders("targets")
        for corpus in root.folders(f"targets/{teacher}")
    ]


def segment_set_paths(root: Root, target_set: str) -> list[str]:
    """Paths of all segment sets of a target set, complete or not; the first is the target set's own."""
    return [target_set, *(f"{target_set}/sets/{name}" for name in root.folders(f"{target_set}/sets"))]


def has_targets(root: Root, teacher: str, corpus: str) -> bool:
    """Tell whether a teacher has a target set for a corpus, complete or not."""
    paths = segment_set_paths(root, targets_path(teacher, corpus))
    return any(root.get(f"{path}/zarr.json") is not None for path in paths)


def teachers_with_targets(root: Root, corpus: str) -> list[str]:
    """Names of the teachers that have targets for a corpus, complete or not."""
    return [name for name in root.folders("targets") if has_targets(root, name, corpus)]


def _open_sets(root: Root, teacher: str, corpus: Corpus, reading: Reading) -> list[SegmentSet]:
    paths = segment_set_paths(root, targets_path(teacher, corpus.name))
    opened = (SegmentSet.open(root, path, corpus, reading) for path in paths)
    return [each for each in opened if each is not None]


def _unshared(
    teacher: str,
    corpus: Corpus,
    identity: TeacherIdentity,
    opened: Sequence[SegmentSet],
    tokenizer: Tokenizer | None,
) -> UnsharedIds:
    """Refuse a teacher to whom the ids of the rows mean other tokens, or that has no logprob for them."""
    if corpus.spec.max_token_id >= identity.vocab_size:
        raise SpecMismatch(
            f"corpus {corpus.name!r} has token id {corpus.spec.max_token_id}, teacher {teacher!r} knows "
            f"{identity.vocab_size} ids; ingest the text again with the teacher's tokenizer"
        )
    theirs = identity.tokenizer_sha256
    if theirs == corpus.tokenizer_sha256:
        return UnsharedIds()
    for each in opened:
        if each.spec.identity.tokenizer_sha256 == theirs:
            return each.spec.unshared
    if tokenizer is not None:
        return unshared_ids(teacher, corpus, identity, tokenizer)
    raise SpecMismatch(
        f"teacher {teacher!r} has tokenizer {theirs[:12]}, corpus {corpus.name!r} was made with "
        f"{corpus.tokenizer_sha256[:12]}; ingest the text again with the teacher's tokenizer, or `potstill "
        "prefill` with the model's folder, which sees whether they differ only in ids that no row uses"
    )
