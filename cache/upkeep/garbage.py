"""Garbage: groups that no record names, left by a writer that was killed or lost the race for a commit.

The segments and the commits of a segment set are listed once each, and only the commits of shards with several
segments are read: a set of 10^5 segments costs some hundred requests. Where a record cannot be read, nothing that it
may name is garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.journal.journal import CLAIMS as JOURNAL_CLAIMS
from potstill.cache.store import Root
from potstill.cache.store.local_files import TEMPORARY
from potstill.cache.store.publishing import remove_unnamed
from potstill.cache.store.record import Record, read_group_metadata, read_record
from potstill.cache.store.root import LONGEST_NAME
from potstill.cache.targets.commit import commit_from_json, commit_name, shard_of_commit
from potstill.cache.targets.manifest import Manifest
from potstill.cache.targets.target_set import segment_set_paths

# Characters that the count of a journal group adds to its teacher's name.
_COUNTED = 20


@dataclass(frozen=True, slots=True)
class Garbage:
    """One group, or folder of claims or temporary files, that no reader can reach."""

    path: str
    size: int
    """Stored bytes."""
    age_seconds: float
    """Seconds since the last write of any object in it, by the store's clock."""
    record: str
    """Path of the record that would name it; empty where none could."""


@dataclass(frozen=True, slots=True)
class _Unnamed:
    path: str
    record: str = ""


OnSkip = Callable[[str], None]


def find_garbage(root: Root, *, min_age_seconds: float, on_skip: OnSkip = lambda _: None) -> list[Garbage]:
    """Find groups that no record names and that nobody wrote to for `min_age_seconds`.

    The age spares the groups of live writers; owners renew claims within minutes, so a folder of old ones is nobody's.
    `on_skip` gets a line for each place that is left alone because a record there cannot be read, or it is a link.
    """
    found = []
    for each in (
        _Unnamed(TEMPORARY),
        _Unnamed(JOURNAL_CLAIMS),
        *_of_corpora(root, on_skip),
        *_of_targets(root, on_skip),
        *_of_journals(root, on_skip),
    ):
        with _told(on_skip):
            age = root.seconds_since_write(each.path)
            if age is not None and age >= min_age_seconds:
                found.append(Garbage(each.path, sum(root.sizes(each.path).values()), age, each.record))
    return found


def remove_garbage(root: Root, item: Garbage) -> bool:
    """Delete garbage; False when it was written to, or a record has come to name it, since it was found.

    Raises:
        StoreError: the store cannot be written; what is left is found again.
    """

    def is_named() -> bool:
        record = root.get(item.record)
        # A journal's record stands beside its group and has its name.
        return record is not None and (item.record == f"{item.path}.json" or _name(item.path).encode() in record)

    if item.record and is_named():
        return False
    age = root.seconds_since_write(item.path)
    if age is None or age < item.age_seconds:
        return False
    if item.record:
        return remove_unnamed(root, item.path, item.record, is_named)
    root.delete(item.path)
    return True


@contextmanager
def _told(on_skip: OnSkip) -> Iterator[None]:
    """Tell of a record that cannot be read, or a link, and go on behind the block: nothing there is garbage."""
    try:
        yield
    except (FormatError, CorruptSegment) as error:
        on_skip(error.detail)


def _of_corpora(root: Root, on_skip: OnSkip) -> Iterator[_Unnamed]:
    for name in root.folders("corpora"):
        path = f"corpora/{name}"
        with _told(on_skip):
            yield from _of_annotations(root, f"{path}/annotations")
        with _told(on_skip):
            folders = root.folders(path)
            seal = read_group_metadata(root, path, "corpus")
            if seal is None and (root.objects(f"{path}/annotations") or _has_targets(root, name)):
                raise FormatError(f"{path}/zarr.json is missing, and targets or annotations of the corpus are there")
            yield from _unnamed_groups(path, folders, "data-", seal, "data", f"{path}/zarr.json")


def _has_targets(root: Root, corpus: str) -> bool:
    return any(root.get(f"targets/{teacher}/{corpus}/zarr.json") is not None for teacher in root.folders("targets"))


def _of_annotations(root: Root, path: str) -> Iterator[_Unnamed]:
    groups = root.folders(path)
    records = [read_record(root, f"{path}/{name}", "annotation") for name in root.objects(path)]
    named = {record.get("group") for record in records if record is not None}
    for group in groups:
        if group not in named:
            yield _Unnamed(f"{path}/{group}", f"{path}/{group.rpartition('-')[0]}.json")


def _of_targets(root: Root, on_skip: OnSkip) -> Iterator[_Unnamed]:
    for path in _set_paths(root, on_skip):
        yield _Unnamed(f"{path}/claims")
        with _told(on_skip):
            folders = root.folders(path)
            spec = read_group_metadata(root, path, "targets")
            # A deletion removes the commits first, so without them the record is not lost but deleted.
            if spec is None and (root.objects(f"{path}/commits") or root.get(f"{path}/manifest.json") is not None):
                raise FormatError(f"{path}/zarr.json is missing, and commits are there")
            yield from _of_segment_set(root, path, folders, on_skip)


def _set_paths(root: Root, on_skip: OnSkip) -> Iterator[str]:
    """Paths of all segment sets; one by one, so that a teacher's folder that is a link hides no other's."""
    for teacher in root.folders("targets"):
        with _told(on_skip):
            for corpus in root.folders(f"targets/{teacher}"):
                with _told(on_skip):
                    yield from segment_set_paths(root, f"targets/{teacher}/{corpus}")


def _of_segment_set(root: Root, path: str, folders: list[str], on_skip: OnSkip) -> Iterator[_Unnamed]:
    for kind in ("ranks", "manifest"):
        with _told(on_skip):
            record = read_record(root, f"{path}/{kind}.json", kind)
            yield from _unnamed_groups(path, folders, f"{kind}-", record, "group", f"{path}/{kind}.json")
    # Segments first: one that is committed in between has its commit in the later list.
    segments = _by_shard(root.folders(f"{path}/segments"))
    committed = {shard_of_commit(name) for name in root.objects(f"{path}/commits")}
    for shard, names in segments.items():
        if shard in committed and len(names) == 1:
            continue
        record_path = f"{path}/commits/{commit_name(shard)}"
        with _told(on_skip):
            named = _committed_segment(root, path, shard)
            if named is not None and named not in names:
                raise FormatError(f"{record_path} names {named!r}, which is not there")
            yield from (_Unnamed(f"{path}/segments/{name}", record_path) for name in names if name != named)


def _committed_segment(root: Root, path: str, shard: int) -> str | None:
    """Name of the shard's segment in its commit, or in the manifest if the commit is lost."""
    record_path = f"{path}/commits/{commit_name(shard)}"
    record = read_record(root, record_path, "commit")
    if record is not None:
        return commit_from_json(record_path, shard, record).segment
    folded = read_record(root, f"{path}/manifest.json", "manifest")
    if folded is None:
        return None
    num_shards = folded.get("shards")
    manifest = Manifest.open(root, path, num_shards) if isinstance(num_shards, int) and shard < num_shards else None
    if manifest is None:
        raise FormatError(f"{path}/manifest.json is not the manifest of a set with shard {shard}")
    return manifest.commits(shard, shard + 1)[0].segment


def _by_shard(segments: list[str]) -> dict[int, list[str]]:
    """Names of segments by their shard; names of another form are not ours to remove, and left out."""
    found: dict[int, list[str]] = {}
    for name in segments:
        shard = name.partition("-")[0]
        if shard.isdecimal():
            found.setdefault(int(shard), []).append(name)
    return found


def _unnamed_groups(
    path: str, folders: list[str], prefix: str, record: Record | None, key: str, record_path: str
) -> Iterator[_Unnamed]:
    named = None if record is None else record.get(key)
    if record is not None and named not in folders:
        # Format 1 does not notice a flip in its records: one of these may be what it meant.
        raise FormatError(f"{record_path} names {named!r}, which is not there")
    for name in folders:
        if name.startswith(prefix) and name != named:
            yield _Unnamed(f"{path}/{name}", record_path)


def _of_journals(root: Root, on_skip: OnSkip) -> Iterator[_Unnamed]:
    for process in root.folders("journal"):
        path = f"journal/{process}"
        with _told(on_skip):
            groups = root.folders(path, longest=LONGEST_NAME + _COUNTED)
            records = [name for name in root.objects(path) if name.endswith(".json")]
            unnamed = [name for name in groups if f"{name}.json" not in records]
            # Another format may name its groups in another way.
            _ = [read_record(root, f"{path}/{name}", "journal") for name in records if unnamed]
            yield from (_Unnamed(f"{path}/{name}", f"{path}/{name}.json") for name in unnamed)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
