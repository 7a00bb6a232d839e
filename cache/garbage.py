"""Groups that no record names: what a writer leaves when it is killed, or loses the race for a commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cache.record import read_group_metadata, read_record
from cache.store import TEMPORARY, Root
from cache.targets import target_set_paths


@dataclass(frozen=True, slots=True)
class Garbage:
    """One group nobody can read, its stored size in bytes."""

    path: str
    size: int


def find_garbage(root: Root, *, min_age_seconds: float) -> list[Garbage]:
    """Unnamed groups that nothing was written to for `min_age_seconds`; a live writer's group is younger."""
    found = []
    for path in (TEMPORARY, *_corpus_garbage(root), *_target_garbage(root), *_journal_garbage(root)):
        age = root.seconds_since_write(path)
        if age is not None and age >= min_age_seconds:
            found.append(Garbage(path, sum(root.sizes(path).values())))
    return found


def remove_garbage(root: Root, item: Garbage) -> None:
    """Delete one group."""
    root.delete(item.path)


def _corpus_garbage(root: Root) -> Iterator[str]:
    for name in root.folders("corpora"):
        seal = read_group_metadata(root, f"corpora/{name}", "corpus")
        for child in root.folders(f"corpora/{name}"):
            if child.startswith("data-") and (seal is None or child != seal.get("data")):
                yield f"corpora/{name}/{child}"


def _target_garbage(root: Root) -> Iterator[str]:
    for path in target_set_paths(root):
        ranks = read_record(root, f"{path}/ranks.json", "ranks") or {}
        for child in root.folders(path):
            if child.startswith("ranks-") and child != ranks.get("group"):
                yield f"{path}/{child}"
        named = _committed_segments(root, path)
        for segment in root.folders(f"{path}/segments"):
            if segment not in named:
                yield f"{path}/segments/{segment}"


def _committed_segments(root: Root, path: str) -> set[str]:
    """What the commits name, whatever else of the target set is there or not."""
    records = (read_record(root, f"{path}/commits/{name}", "commit") for name in root.objects(f"{path}/commits"))
    return {str(record.get("segment")) for record in records if record is not None}


def _journal_garbage(root: Root) -> Iterator[str]:
    for process in root.folders("journal"):
        records = set(root.objects(f"journal/{process}"))
        for name in root.folders(f"journal/{process}"):
            if f"{name}.json" not in records:
                yield f"journal/{process}/{name}"
