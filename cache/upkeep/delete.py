"""Deletion of targets, corpora, annotations and journals, during which no reader sees a commit without its segment.

A segment set is deleted in phases: the manifest's record, then commits, then the set's own record, and only then
groups. Wherever that stops, the rest reads as never written, and the same deletion finishes it. Between phases a
local root is flushed, so that a power cut cannot undo an early phase and keep a late one. A job may fold commits into
a manifest meanwhile: so its record is removed once more after them, and `Commits.fold` takes back a later one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.annotations import require_name
from potstill.cache.corpus.seal import corpus_path
from potstill.cache.errors import NotFound, PotstillError, UnknownCorpus, UnknownTeacher
from potstill.cache.fill.shard_queue import claim_name
from potstill.cache.journal.rows import journal_teachers
from potstill.cache.journal.segment import journal_records
from potstill.cache.plurals import counted
from potstill.cache.store import Root
from potstill.cache.store.claims import time_to_live
from potstill.cache.store.root import check_name, is_name
from potstill.cache.targets.commit import commit_name
from potstill.cache.targets.target_set import segment_set_paths, target_set_paths, targets_path

FIRST_SET = "first"
"""Name of the segment set that was made first, which lies directly in the target set's folder."""

# By pattern, not as JSON: a damaged record must still lead to the group that goes with it.
_SEGMENT = re.compile(rb'"segment": *"([^"]+)"')
_FOLDED = re.compile(rb'"shards": *(\d{1,9})\b')
_GROUP = re.compile(rb'"group": *"([^"]+)"')
# Claims that do not tell their time to live are renewed more often than this, in seconds.
_CLAIM_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Removal:
    """Objects that are deleted together, and in which order."""

    title: str
    phases: tuple[tuple[str, ...], ...]
    """Paths below the root: objects, and folders with `/` at the end; each phase is done before the next begins."""
    num_objects: int
    num_bytes: int
    claims: tuple[str, ...] = ()
    """Path prefixes of claims by jobs that may be at work on it, where the claims themselves stay."""


def set_arguments(path: str) -> str:
    """Command-line options that name the segment set at `path`."""
    _, teacher, corpus, *name = path.split("/")
    return f"--teacher {teacher} --corpus {corpus} --set {name[1] if name else FIRST_SET}"


def plan_teacher(root: Root, teacher: str, corpus: str | None = None) -> list[Removal]:
    """Plan to delete all targets of a teacher, or those for one corpus.

    Raises:
        UnknownTeacher: there are none.
    """
    check_name("teacher", teacher)
    found = [path for path in target_set_paths(root) if path.split("/")[1] == teacher and root.sizes(path)]
    wanted = [path for path in found if corpus is None or path == targets_path(teacher, corpus)]
    if not wanted:
        raise _unknown_targets(root, teacher, corpus, found)
    return [removal for path in wanted for removal in _target_set(root, path)]


def plan_set(root: Root, teacher: str, corpus: str, name: str) -> list[Removal]:
    """Plan to delete one segment set: `FIRST_SET`, or the name of one whose fields were added later.

    Raises:
        UnknownTeacher, NotFound: there is none.
    """
    return [_segment_set(root, _set_path(root, teacher, corpus, name))]


def plan_shards(root: Root, teacher: str, corpus: str, name: str | None, shards: Sequence[int]) -> list[Removal]:
    """Plan to delete shards of one segment set, or of all sets that have committed them; manifests are deleted too.

    Raises:
        UnknownTeacher, NotFound: there are no such targets, or no commit of a shard.
    """
    plan_teacher(root, teacher, corpus)
    every = segment_set_paths(root, targets_path(teacher, corpus))
    paths = every if name is None else [_set_path(root, teacher, corpus, name)]
    held = {path: _held_shards(root, path, shards) for path in paths}
    for shard in shards:
        if not any(shard in its for its in held.values()):
            raise _no_commit(root, corpus, paths, shard)
    # A job that fills several sets claims a shard in one of them, for all: look in every set.
    claims = tuple(f"{path}/claims/{claim_name(shard)}-" for path in every for shard in shards)
    return [replace(_shards(root, path, its), claims=claims) for path, its in held.items() if its]


def plan_corpus(root: Root, corpus: str) -> list[Removal]:
    """Plan to delete a corpus, its annotations, and all teachers' targets for it.

    Raises:
        UnknownCorpus: there is neither the corpus nor targets for it.
    """
    path = corpus_path(corpus)
    targets = [each for each in target_set_paths(root) if each.split("/")[2] == corpus and root.sizes(each)]
    sizes = root.sizes(path)
    if not targets and not sizes:
        known = ", ".join(name for name in root.folders("corpora") if root.sizes(f"corpora/{name}")) or "none"
        raise UnknownCorpus(f"no corpus {corpus!r} in {root.url}; there are: {known}")
    seal = (f"{path}/zarr.json",) if root.get(f"{path}/zarr.json") is not None else ()
    records = (*seal, *(f"{path}/annotations/{name}" for name in root.objects(f"{path}/annotations")))
    whole = Removal(f"corpus {corpus!r}", (records, (f"{path}/",)), len(sizes), sum(sizes.values()))
    return [*(removal for each in targets for removal in _target_set(root, each)), whole]


def plan_annotation(root: Root, corpus: str, name: str) -> list[Removal]:
    """Plan to delete one annotation of a corpus.

    Raises:
        InvalidInput: it is no name. NotFound: there is none.
    """
    require_name(name)
    folder = f"{corpus_path(corpus)}/annotations"
    record = root.get(f"{folder}/{name}.json")
    if record is None:
        known = ", ".join(sorted(each.removesuffix(".json") for each in root.objects(folder))) or "none"
        raise NotFound(f"corpus {corpus!r} has no annotation {name!r}; there are: {known}")
    group = _named(root, f"{folder}/{name}.json", _GROUP)
    sizes = root.sizes(f"{folder}/{group}") if group else {}
    phases = ((f"{folder}/{name}.json",), *(((f"{folder}/{group}/",),) if sizes else ()))
    title = f"annotation {name!r} of corpus {corpus!r}"
    return [Removal(title, phases, len(sizes) + 1, sum(sizes.values()) + len(record))]


def plan_journal(root: Root, teacher: str) -> list[Removal]:
    """Plan to delete a teacher's journal: rows that services scored and that belong to no corpus.

    Raises:
        NotFound: there is none.
    """
    check_name("teacher", teacher)
    paths = journal_records(root, teacher)
    if not paths:
        known = ", ".join(journal_teachers(root)) or "none"
        raise NotFound(f"teacher {teacher!r} has no journal in {root.url}; there are journals of: {known}")
    sizes = [root.sizes(path) for path in paths]
    phases = (tuple(f"{path}.json" for path in paths), tuple(f"{path}/" for path in paths))
    count, stored = sum(map(len, sizes)) + len(paths), sum(sum(each.values()) for each in sizes)
    return [Removal(f"journal of teacher {teacher!r}: {counted(len(paths), 'segment')}", phases, count, stored)]


def remove(root: Root, removal: Removal) -> None:
    """Delete what was planned, one phase after the other.

    Raises:
        StoreError: the store refuses; call it again to go on.
    """
    for phase in removal.phases:
        for path in phase:
            if path.endswith("/"):
                root.delete(path[:-1])
            else:
                root.remove(path)
        # A flush of a removed path syncs the folders above it, so one path for each folder is enough.
        for path in {path.rstrip("/").rpartition("/")[0]: path for path in phase}.values():
            root.flush(path.rstrip("/"))


def jobs_at_work(root: Root, removals: Sequence[Removal]) -> list[str]:
    """Segment sets and single shards among `removals` at which other jobs are at work, by their fresh claims."""
    sets = {path for removal in removals for phase in removal.phases for path in phase if path.endswith("/claims/")}
    prefixes = sets | {path for removal in removals for path in removal.claims}
    busy = []
    for folder in sorted({prefix.rpartition("/")[0] for prefix in prefixes}):
        fresh = tuple(f"{folder}/{name}" for name, age in root.ages(folder).items() if age < _lasts(root, folder, name))
        path = folder.removesuffix("/claims")
        for prefix in sorted(each for each in prefixes if each.rpartition("/")[0] == folder):
            if any(claim.startswith(prefix) for claim in fresh):
                shard = prefix[len(folder) + 1 : -1]
                busy.append(f"shard {int(shard)} of {path}" if shard else path)
    return busy


def _lasts(root: Root, folder: str, name: str) -> float:
    return max(time_to_live(root.get(f"{folder}/{name}"), _CLAIM_SECONDS), _CLAIM_SECONDS)


def _target_set(root: Root, path: str) -> Iterator[Removal]:
    """Plan to delete a target set, the sets that were added later first: without the first it is not listed."""
    for each in reversed(segment_set_paths(root, path)):
        if root.sizes(each):
            yield _segment_set(root, each)


def _segment_set(root: Root, path: str) -> Removal:
    objects = root.objects(path)
    folders = [name for name in root.folders(path) if name != "sets"]
    sizes = [root.sizes(f"{path}/{name}") for name in folders]
    commits = len(root.objects(f"{path}/commits"))
    last = [name for name in objects if name != "manifest.json"]
    # The claims go last: while they are there, a job that still runs can be seen.
    groups = sorted((name for name in folders if name != "commits"), key=lambda name: name == "claims")
    phases = (
        (f"{path}/manifest.json",),
        tuple(f"{path}/{name}/" for name in folders if name == "commits"),
        (f"{path}/manifest.json", *(f"{path}/{name}" for name in last)),
        tuple(f"{path}/{name}/" for name in groups),
    )
    count = sum(map(len, sizes)) + len(objects)
    stored = sum(sum(each.values()) for each in sizes)
    return Removal(f"{path}: {counted(commits, 'shard')}", tuple(phase for phase in phases if phase), count, stored)


def _shards(root: Root, path: str, shards: Sequence[int]) -> Removal:
    manifest = _named(root, f"{path}/manifest.json", _GROUP)
    commits = [f"{path}/commits/{commit_name(shard)}" for shard in shards]
    # Only segments that commits name: another one may be a writer's that is about to commit it.
    segments = [_named(root, commit, _SEGMENT) for commit in commits]
    groups = [f"{path}/segments/{segment}" for segment in segments if segment]
    record = (f"{path}/manifest.json",) if root.get(f"{path}/manifest.json") is not None else ()
    groups += [f"{path}/{manifest}"] if manifest else []
    sizes = [root.sizes(group) for group in groups]
    held = tuple(f"{group}/" for group, objects in zip(groups, sizes, strict=True) if objects)
    phases = ((f"{path}/manifest.json",), tuple(commits), (f"{path}/manifest.json",), held)
    what = ", ".join(map(str, shards[:10])) + (f" and {len(shards) - 10:,} more" if len(shards) > 10 else "")
    title = f"{path}: shards {what}{', and the manifest' if record else ''}"
    count = sum(map(len, sizes)) + len(commits) + len(record)
    return Removal(title, tuple(phase for phase in phases if phase), count, sum(sum(each.values()) for each in sizes))


def _held_shards(root: Root, path: str, shards: Sequence[int]) -> list[int]:
    """Shards with a commit, or whose commit was folded into the manifest and lost since."""
    folded = _FOLDED.search(root.get(f"{path}/manifest.json") or b"")
    commits, count = set(root.objects(f"{path}/commits")), int(folded[1]) if folded else 0
    return [shard for shard in shards if commit_name(shard) in commits or 0 <= shard < count]


def _no_commit(root: Root, corpus: str, paths: Sequence[str], shard: int) -> NotFound:
    try:
        last = Corpus.open(root, corpus).num_shards - 1
    except PotstillError:
        last = shard  # the corpus is damaged or gone; what is there of its targets can be deleted all the same
    if not 0 <= shard <= last:
        return NotFound(f"there is no shard {shard} of corpus {corpus!r}; it has shards 0 to {last}")
    return NotFound(f"shard {shard} of {', '.join(paths)} has no commit; `potstill gc` removes what is left of it")


def _named(root: Root, record: str, pattern: re.Pattern[bytes]) -> str | None:
    """Name of the group that a record names, even when the rest of the record is damaged; None when it has none."""
    found = pattern.search(root.get(record) or b"")
    name = found[1].decode("ascii", "replace") if found else ""
    return name if is_name(name) else None


def _set_path(root: Root, teacher: str, corpus: str, name: str) -> str:
    plan_teacher(root, teacher, corpus)
    target_set = targets_path(teacher, corpus)
    names = {
        FIRST_SET: target_set,
        **{path.rpartition("/")[2]: path for path in segment_set_paths(root, target_set)[1:]},
    }
    known = [each for each, path in names.items() if root.sizes(path)]
    if name not in known:
        raise NotFound(f"{target_set} has no segment set {name!r}; there are: {', '.join(known)}")
    return names[name]


def _unknown_targets(root: Root, teacher: str, corpus: str | None, found: Sequence[str]) -> UnknownTeacher:
    if found:
        known = ", ".join(path.split("/")[2] for path in found)
        return UnknownTeacher(f"teacher {teacher!r} has no targets for corpus {corpus!r}; it has some for: {known}")
    paths = (path for path in target_set_paths(root) if root.sizes(path))
    known = ", ".join(dict.fromkeys(path.split("/")[1] for path in paths)) or "none"
    return UnknownTeacher(f"no targets of teacher {teacher!r} in {root.url}; there are those of: {known}")
