"""Inspection of a cache: the figures that `potstill inspect` prints and draws.

Shape legend:  S shards, C commits of a segment set.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.annotations import open_annotation
from potstill.cache.errors import CorruptSegment, FormatError, SpecMismatch
from potstill.cache.journal import SegmentRecord
from potstill.cache.journal.segment import journal_records
from potstill.cache.lineage import ONLY_BOUNDED, Handed, measured_against
from potstill.cache.plurals import counted
from potstill.cache.store import Reading, Root, StoredObject
from potstill.cache.targets import Commit, SegmentSet, TargetSet
from potstill.cache.targets.manifest import Manifest

# Figures to which even old versions of `compact` added no bound.
_COUNTED = ("saturated", "saturated_mass")
# Commits held at one time, about 5 KB each.
_COMMITS_AT_ONCE = 1024


@dataclass(slots=True)
class SetSummary:
    """Sums over the commits of one segment set."""

    segments: SegmentSet
    folded: bool
    covered: NDArray[np.bool_]
    """[S] True for a shard with a commit."""
    positions: int = 0
    num_bytes: int = 0
    array_bytes: Counter[str] = field(default_factory=Counter)
    """Stored bytes by the array's name."""
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Values [C] of each error figure that was measured, by its name."""
    against: Counter[Handed] = field(default_factory=Counter)
    """Number of shards by what their error figures compare the decoded targets with."""
    provenances: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """Number of shards by engine, engine version, device and capture path."""
    first_captured: str = ""
    last_captured: str = ""

    @property
    def name(self) -> str:
        """Name of the set: its folder's, or `first`."""
        parts = self.segments.path.split("/")
        return parts[-1] if len(parts) > 3 else "first"

    @property
    def bytes_per_position(self) -> float | None:
        """Stored bytes divided by committed positions; None when there are none."""
        return self.num_bytes / self.positions if self.positions else None

    @property
    def worst_error(self) -> dict[str, float]:
        """The largest of each error figure."""
        return {name: max(values) for name, values in self.errors.items()}

    def add(self, commit: Commit, positions: int) -> None:
        """Add one commit, of a shard with so many positions."""
        self.covered[commit.shard] = True
        self.positions += positions
        self.num_bytes += commit.num_bytes
        for item in commit.objects:
            self.array_bytes[_array_of(item)] += item.size
        made = commit.provenance
        if commit.error:
            handed = measured_against(made.steps, commit.error, self.segments.spec.encoding.max_abs_error)
            self.against[handed] += 1
            for name, value in commit.error.items():
                if handed != ONLY_BOUNDED or name in _COUNTED:
                    self.errors[name].append(float(value))
        self.provenances[made.engine, made.engine_version, made.device, made.whole_path] += 1
        if made.captured_at:
            self.first_captured = min(self.first_captured or made.captured_at, made.captured_at)
            self.last_captured = max(self.last_captured, made.captured_at)

    def to_json(self) -> dict[str, Any]:
        """Convert to the JSON object that `inspect --json` prints."""
        spec = self.segments.spec
        return {
            "name": self.name,
            "path": self.segments.path,
            "fields": spec.fields.to_json(),
            "encoding": spec.encoding.to_json(),
            "shards_committed": int(self.covered.sum()),
            "shards": len(self.covered),
            "folded": self.folded,
            "bytes": self.num_bytes,
            "bytes_per_position": self.bytes_per_position,
            "array_bytes": dict(self.array_bytes.most_common()),
            "measured_error": self.worst_error,
            "measured_against": _describe_against(self.against),
            "provenance": [
                dict(zip(("engine", "engine_version", "device", "capture_path", "shards"), (*key, count), strict=True))
                for key, count in self.provenances.most_common()
            ],
            "first_captured": self.first_captured or None,
            "last_captured": self.last_captured or None,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """Findings of an inspection: the JSON that is printed, and the sums by teacher and corpus behind it."""

    to_json: dict[str, Any]
    sets: dict[tuple[str, str], list[SetSummary]]


@contextmanager
def _noted(unreadable: list[str]) -> Iterator[None]:
    """Note an unreadable record met in the block, and go on after the block: the rest is shown all the same."""
    try:
        yield
    except (CorruptSegment, FormatError, SpecMismatch) as error:
        unreadable.append(str(error))


def inspect_cache(cache: Cache, corpus: str | None = None) -> Inspection:
    """Read every record of a cache, or those of one corpus, but no segment.

    A record that cannot be read becomes a line of `unreadable`, and its corpus, set or shard is left out of the sums.
    """
    corpora: dict[str, Any] = {}
    targets: dict[str, dict[str, Any]] = {}
    summaries: dict[tuple[str, str], list[SetSummary]] = {}
    unreadable: list[str] = []
    for name in cache.corpora() if corpus is None else [corpus]:
        with _noted(unreadable):
            corpora[name] = _describe_corpus(cache.root, cache.corpus(name))
        for teacher in cache.teachers(name) if name in corpora else ():
            with _noted(unreadable):
                opened = cache.targets(teacher, name)
                sets = [_summarise(cache.root, each, unreadable) for each in opened.sets]
                targets.setdefault(teacher, {})[name] = _describe_targets(opened, sets)
                summaries[teacher, name] = sets
    journals = _describe_journals(cache.root, unreadable) if corpus is None else {}
    return Inspection(
        {"corpora": corpora, "targets": targets, "journals": journals, "unreadable": unreadable}, summaries
    )


def against_text(measured_against: Sequence[Mapping[str, Any]]) -> str:
    """Say in a few words what a set's error was measured against; a dash when nothing was measured."""
    if len(measured_against) < 2:
        return "".join(each["what"] for each in measured_against) or "-"
    return "; ".join(f"{counted(each['shards'], 'shard')}: {each['what']}" for each in measured_against)


def _describe_corpus(root: Root, corpus: Corpus) -> dict[str, Any]:
    annotations = {name: open_annotation(root, corpus.annotated, name) for name in corpus.annotations()}
    return {
        "rows": len(corpus),
        "positions": corpus.num_positions,
        "shards": corpus.num_shards,
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "documents": corpus.spec.num_documents,
        "taught_positions": corpus.num_positions if corpus.spec.num_taught is None else corpus.spec.num_taught,
        "duplicate_rows": corpus.spec.duplicate_rows,
        "sources": [asdict(source) for source in corpus.spec.sources],
        "bytes": sum(item.size for item in corpus.spec.objects),
        "annotations": {
            name: {
                "dtype": found.dtype,
                "bytes": sum(item.size for item in found.objects),
                "provenance": dict(found.provenance),
            }
            for name, found in annotations.items()
        },
    }


def _describe_targets(targets: TargetSet, sets: list[SetSummary]) -> dict[str, Any]:
    per_position = [each.bytes_per_position for each in sets if each.bytes_per_position is not None]
    covered = np.logical_and.reduce([each.covered for each in sets])
    worst: dict[str, float] = {}
    for each in sets:
        for name, value in each.worst_error.items():
            worst[name] = max(worst.get(name, value), value)
    return {
        "identity": targets.identity.to_json(),
        "unshared_ids": targets.unshared.to_json(),
        "fields": targets.fields.to_json(),
        "encoding": targets.encoding.to_json(),
        "shards_committed": int(covered.sum()),
        "shards": targets.corpus.num_shards,
        "bytes": sum(each.num_bytes for each in sets),
        "bytes_per_position": sum(per_position) if per_position else None,
        "measured_error": worst,
        "measured_against": _describe_against(sum((each.against for each in sets), Counter())),
        "sets": [each.to_json() for each in sets],
    }


def _describe_against(against: Counter[Handed]) -> list[dict[str, Any]]:
    return [
        {"what": handed.words, "max_abs_error": handed.max_abs_error, "shards": shards}
        for handed, shards in against.most_common()
    ]


def _describe_journals(root: Root, unreadable: list[str]) -> dict[str, Any]:
    journals: dict[str, Any] = {}
    for path in journal_records(root):
        record = None
        with _noted(unreadable):
            record = SegmentRecord.read(root, path)
        if record is not None:
            about = journals.setdefault(record.teacher, {"segments": 0, "rows": 0, "positions": 0, "bytes": 0})
            for name, value in zip(about, (1, record.num_rows, record.num_positions, record.num_bytes), strict=True):
                about[name] += value
    return journals


def _summarise(root: Root, segments: SegmentSet, unreadable: list[str]) -> SetSummary:
    starts = segments.corpus.shard_starts
    manifest = Manifest.open(root, segments.path, segments.corpus.num_shards)
    summary = SetSummary(segments, manifest is not None, np.zeros(len(starts) - 1, dtype=bool))
    for commit in _commits(root, segments, manifest, unreadable):
        summary.add(commit, int(starts[commit.shard + 1] - starts[commit.shard]))
    return summary


def _commits(root: Root, segments: SegmentSet, manifest: Manifest | None, unreadable: list[str]) -> Iterator[Commit]:
    """Read all commits, with at most `_COMMITS_AT_ONCE` in memory."""
    if manifest is not None:
        for start in range(0, manifest.num_shards, _COMMITS_AT_ONCE):
            yield from manifest.commits(start, min(start + _COMMITS_AT_ONCE, manifest.num_shards))
        return
    shards = np.flatnonzero(segments.commits.committed).tolist()
    for start in range(0, len(shards), _COMMITS_AT_ONCE):
        # Opened anew each time: a segment set remembers every commit that it read.
        opened = SegmentSet.open(root, segments.path, segments.corpus, Reading.open())
        for shard in shards[start : start + _COMMITS_AT_ONCE] if opened else ():
            commit = None
            with _noted(unreadable):
                commit = opened.commits.of(shard) if opened else None
            if commit is not None:
                yield commit


def _array_of(item: StoredObject) -> str:
    name, slash, _ = item.path.partition("/")
    return name if slash else "metadata"
