"""Corpora and target sets that stay open between requests, for as long as they agree with the store.

Targets, or a whole corpus, may be deleted while a service runs, and filled again. An open set remembers the old
commits, so it is compared with the store again every few seconds.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from potstill.cache.cache import Cache, CorporaLook
from potstill.cache.corpus import Corpus
from potstill.cache.corpus.seal import corpus_path
from potstill.cache.errors import CorruptSegment, SpecMismatch, UnknownCorpus
from potstill.cache.store import Root
from potstill.cache.targets import TargetSet
from potstill.cache.targets.commit import commit_name
from potstill.cache.targets.target_set import segment_set_paths, targets_path
from potstill.cache.types import TeacherIdentity

K = TypeVar("K")
T = TypeVar("T")
_OPEN = 64  # sets; an open one holds its spec and commits, and further ones cost the opening again
_TRUST_SECONDS = 2.0  # a comparison lists folders, each a round trip to an object store


@dataclass(slots=True)
class _Seen:
    """The records that a set was opened from; another version, or another record, may mean other targets."""

    root: Root
    folders: tuple[str, ...]
    target_set: str = ""
    versions: dict[str, dict[str, str]] = field(init=False)
    sets: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = {folder: self.root.versions(folder) for folder in self.folders}
        self.sets = self._sets()

    def still_there(self) -> bool:
        """True where the store has these very records and no others."""
        if self._sets() != self.sets:
            return False
        return all(self.root.versions(folder) == before for folder, before in self.versions.items())

    def knows(self, targets: TargetSet) -> bool:
        """True where the records have every commit that the targets remember; one may have come, and gone, since."""
        return all(
            commit_name(shard) in listed
            for each in targets.sets
            if (listed := self.versions.get(f"{each.path}/commits")) is not None
            for shard in each.commits.remembered
        )

    def _sets(self) -> list[str]:
        return segment_set_paths(self.root, self.target_set) if self.target_set else []


@dataclass(slots=True)
class _Opened(Generic[T]):
    value: T
    seen: _Seen
    checked_at: float


def _is_current(opened: _Opened[Any]) -> bool:
    """True where the opened set agrees with the store, or did so a moment ago."""
    now = time.monotonic()
    if now - opened.checked_at < _TRUST_SECONDS:
        return True
    opened.checked_at = now
    value = opened.value
    known = not isinstance(value, TargetSet) or opened.seen.knows(value)
    return known and opened.seen.still_there()


class OpenedSets:
    """Opens corpora and target sets of a cache by name. Safe to share between threads."""

    def __init__(self, cache: Cache | None, served: Callable[[str], TeacherIdentity | None] = lambda _: None) -> None:
        """Open nothing yet; `served` gives the identity of the teacher that answers under a name, if one does."""
        self._cache = cache
        self._served = served
        self._lock = threading.Lock()
        self._corpora: OrderedDict[str, _Opened[Corpus]] = OrderedDict()
        self._targets: OrderedDict[tuple[str, str], _Opened[TargetSet]] = OrderedDict()

    @property
    def root(self) -> Root:
        """The root of the cache.

        Raises:
            UnknownCorpus: the service has no cache.
        """
        return self._require_cache().root

    def look_at_corpora(self, look: Callable[[str], T]) -> CorporaLook[T]:
        """Look at each corpus, like `Cache.look_at_corpora`; without a cache there are none."""
        return CorporaLook({}, {}) if self._cache is None else self._cache.look_at_corpora(look)

    def teachers(self, corpus: str) -> list[str]:
        """Names of the teachers that have targets for a corpus."""
        return self._require_cache().teachers(corpus)

    def corpus(self, name: str) -> Corpus:
        """A corpus as it is in the store now, or was a moment ago.

        Raises:
            UnknownCorpus: there is none, or the service has no cache.
        """
        cache = self._require_cache()

        def open_it() -> _Opened[Corpus]:
            # The records first: a change during the opening is then seen at the next comparison.
            seen = _Seen(cache.root, (corpus_path(name),))
            return _Opened(cache.fresh().corpus(name), seen, time.monotonic())

        return self._get(self._corpora, name, open_it)

    def targets(self, teacher: str, corpus: str) -> TargetSet:
        """A teacher's targets for a corpus.

        Raises:
            UnknownCorpus, UnknownTeacher: there are none.
            SpecMismatch: another teacher is served under the name.
        """
        cache = self._require_cache()
        self.corpus(corpus)
        path = targets_path(teacher, corpus)

        def open_it() -> _Opened[TargetSet]:
            paths = segment_set_paths(cache.root, path)
            # Where commits are folded into a manifest, a deletion removes that first: 10^5 need not be listed.
            unfolded = (f"{each}/commits" for each in paths if cache.root.get(f"{each}/manifest.json") is None)
            seen = _Seen(cache.root, (corpus_path(corpus), *paths, *unfolded), path)
            return _Opened(cache.fresh().targets(teacher, corpus), seen, time.monotonic())

        found = self._get(self._targets, (teacher, corpus), open_it)
        served = self._served(teacher)
        differences = served and found.identity.source.differences(served)
        if differences:
            raise SpecMismatch(
                f"targets of {teacher!r} for corpus {corpus!r} are not of the teacher that is served under this name "
                f"({differences}); serve it under another one"
            )
        return found

    def watched(self, targets: TargetSet, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the pieces on; where they end in damage, the next request opens the target set anew.

        Targets that were deleted a moment ago look damaged to a set that remembers their commit.
        """
        try:
            yield from pieces
        except CorruptSegment:
            with self._lock:
                self._targets.pop((targets.teacher, targets.corpus.name), None)
            raise

    def _get(self, opened: OrderedDict[K, _Opened[T]], key: K, open_it: Callable[[], _Opened[T]]) -> T:
        with self._lock:
            found = opened.get(key)
            if found is not None:
                opened.move_to_end(key)
        if found is not None and _is_current(found):
            return found.value
        with self._lock:
            # Before opening, which raises where all was deleted: the next request must not find the old set. Another
            # thread may have put a newer one here meanwhile, which stays.
            if opened.get(key) is found:
                opened.pop(key, None)
        found = open_it()
        with self._lock:
            opened[key] = found
            opened.move_to_end(key)
            while len(opened) > _OPEN:
                opened.popitem(last=False)
        return found.value

    def _require_cache(self) -> Cache:
        if self._cache is None:
            raise UnknownCorpus("this service has no cache; start it with --cache")
        return self._cache
