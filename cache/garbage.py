"""Groups that no record names: what a writer leaves when it is killed, or loses the race for a commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cache.corpus import Corpus, list_corpora
from cache.errors import UnknownTeacher
from cache.record import read_record
from cache.store import Root
from cache.targets import TargetSet


@dataclass(frozen=True, slots=True)
class Garbage:
    """One group nobody can read, its stored size in bytes."""

    path: str
    size: int


def find_garbage(root: Root, *, min_age_seconds: float) -> list[Garbage]:
    """Unnamed groups that nothing was written to for `min_age_seconds`; a live writer's group is younger."""
    found = []
    for path in (*_corpus_garbage(root), *_target_garbage(root), *_journal_garbage(root)):
        age = root.seconds_since_write(path)
        if age is not None and age >= min_age_seconds:
            found.append(Garbage(path, sum(root.sizes(path).values())))
    return found


def remove_garbage(root: Root, item: Garbage) -> None:
    """Delete one group."""
    root.delete(item.path)


def _corpus_garbage(root: Root) -> Iterator[str]:
    sealed = set(list_corpora(root))
    for name in root.children("corpora"):
        data = Corpus.open(root, name).spec.data if name in sealed else None
        for child in root.children(f"corpora/{name}"):
            if child.startswith("data-") and child != data:
                yield f"corpora/{name}/{child}"


def _target_garbage(root: Root) -> Iterator[str]:
    for teacher in root.children("targets"):
        for corpus in root.children(f"targets/{teacher}"):
            path = f"targets/{teacher}/{corpus}"
            ranks = read_record(root, f"{path}/ranks.json", "ranks")
            for child in root.children(path):
                if child.startswith("ranks-") and child != (ranks or {}).get("group"):
                    yield f"{path}/{child}"
            named = _committed_segments(root, teacher, corpus)
            for segment in root.children(f"{path}/segments"):
                if segment not in named:
                    yield f"{path}/segments/{segment}"


def _committed_segments(root: Root, teacher: str, corpus: str) -> set[str]:
    try:
        targets = TargetSet.open(root, teacher, Corpus.open(root, corpus))
    except UnknownTeacher:
        return set()
    return {commit.segment for commit in targets.commits()}


def _journal_garbage(root: Root) -> Iterator[str]:
    for process in root.children("journal"):
        names = set(root.children(f"journal/{process}"))
        for name in sorted(names):
            if not name.endswith(".json") and f"{name}.json" not in names:
                yield f"journal/{process}/{name}"
