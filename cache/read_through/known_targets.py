"""Look-up by row key in one teacher's committed targets over all corpora of a cache.

Corpora are asked in the order of their names, and those whose targets began after the first look are asked last: so
an answer does not change when another corpus is filled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from potstill.cache.cache import Cache
from potstill.cache.errors import CorruptSegment, FormatError, NotCommitted, PotstillError, StoreError
from potstill.cache.fields import FIELDS
from potstill.cache.targets import TargetSet
from potstill.cache.targets.target_set import has_targets
from potstill.cache.types import Fields, Targets, TeacherIdentity

_LOG = logging.getLogger(__name__)

# Seconds between listings of target sets; a new commit in a known set is found at once.
_REFRESH_SECONDS = 2.0


class KnownTargets:
    """The committed targets of one teacher and identity; thread-safe."""

    def __init__(
        self, cache: Cache, teacher: str, identity: TeacherIdentity, on_trouble: Callable[[PotstillError], None]
    ) -> None:
        self._cache = cache
        self._teacher = teacher
        self._identity = identity
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._sets: dict[str, TargetSet] = {}
        self._strangers: set[str] = set()
        self._reopened_at: dict[str, float] = {}
        self._read_at = float("-inf")

    def look_again(self) -> None:
        """List target sets again at the next `find`, however recent the last listing is."""
        self._read_at = float("-inf")

    def find(
        self, keys: Sequence[bytes], want: Fields, below: Sequence[int | None] | None = None
    ) -> list[Targets | None]:
        """Find the committed targets of each row, with exactly the fields `want`; None where there are none.

        Where `below` has a number for a row, only target sets that keep fewer entries are asked. Rows that cannot be
        read count as not committed, and `on_trouble` gets the error.
        """
        found: dict[int, Targets] = {}
        limits = below or [None] * len(keys)
        self._refresh(want)
        for targets in list(self._sets.values()):
            holding = holding_only(targets, want)
            if holding is None:
                continue
            k = holding.fields.k
            left = [i for i, limit in enumerate(limits) if i not in found and (limit is None or k < limit)]
            if not left:
                continue
            try:
                found.update(self._find_in(holding, keys, left, want))
            except (CorruptSegment, FormatError, StoreError) as error:
                self._on_trouble(error)
        return [found.get(i) for i in range(len(keys))]

    def _find_in(
        self, targets: TargetSet, keys: Sequence[bytes], left: Sequence[int], want: Fields
    ) -> dict[int, Targets]:
        corpus = targets.corpus
        located = zip(left, corpus.find([keys[i] for i in left]), strict=True)
        shards = {i: (row, corpus.shard_of_row(row)) for i, row in located if row is not None}
        committed = {shard for shard in {shard for _, shard in shards.values()} if targets.is_committed(shard)}
        rows = {i: row for i, (row, shard) in shards.items() if shard in committed}
        try:
            return dict(zip(rows, targets.read_rows(list(rows.values()), fields=want), strict=True))
        except (CorruptSegment, NotCommitted):
            return self._one_by_one(targets, rows, want)

    def _one_by_one(self, targets: TargetSet, rows: dict[int, int], want: Fields) -> dict[int, Targets]:
        """Read the rows that can be read where some are damaged, or were deleted (and perhaps filled again) since."""
        self._reopen(targets.corpus.name)
        opened = self._sets.get(targets.corpus.name)
        fresh = None if opened is None else holding_only(opened, want)
        found = {}
        for i, row in rows.items():
            if fresh is None:
                break
            try:
                found[i] = fresh.read_rows([row], fields=want)[0]
            except NotCommitted:
                continue
            except CorruptSegment as error:
                self._on_trouble(error)
        return found

    def _reopen(self, corpus: str) -> None:
        """Open a corpus' targets again, to forget remembered commits; not too often, as damage stays."""
        with self._lock:
            now = time.monotonic()
            if now - self._reopened_at.get(corpus, float("-inf")) >= _REFRESH_SECONDS:
                self._reopened_at[corpus] = now
                self._sets.pop(corpus, None)
                self._open(corpus)

    def _refresh(self, want: Fields) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._read_at < _REFRESH_SECONDS:
                return
            self._read_at = now
            try:
                for corpus in self._cache.corpora():
                    known = self._sets.get(corpus)
                    # A field may have been added since.
                    if known is None or holding_only(known, want) is None:
                        self._open(corpus)
            except PotstillError as error:
                self._on_trouble(error)

    def _open(self, corpus: str) -> None:
        if not has_targets(self._cache.root, self._teacher, corpus):
            return
        try:
            targets = self._cache.targets(self._teacher, corpus)
        except PotstillError as error:
            self._on_trouble(error)
            return
        differences = targets.identity.differences(self._identity)
        if not differences:
            self._sets[corpus] = targets
        elif corpus not in self._strangers and not targets.fields.alignment:
            self._strangers.add(corpus)
            _LOG.warning("teacher %s: its targets of corpus %s are not used: %s", self._teacher, corpus, differences)


def holding_only(targets: TargetSet, want: Fields) -> TargetSet | None:
    """Reduce to the segment sets with the wanted fields; None when they do not have all of them.

    Then uncommitted shards of other fields do not matter.
    """
    if not all(each.serves(targets.fields, want) for each in FIELDS):
        return None
    sets = [each for each in targets.sets if any(field.is_asked(each.spec.fields) for field in want.asked)]
    return TargetSet(targets.teacher, targets.corpus, sets)
