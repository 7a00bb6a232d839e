"""CachedTeacher: a teacher behind what is already known of it.

A row is looked for in the journal, then in every corpus that has committed targets of the same teacher and
identity; only a miss reaches the teacher behind, once, however many callers wait for it. A miss is answered
through the journal's encoding, so that the answer is what a later hit returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cache.cache import Cache
from cache.corpus import row_key
from cache.encoding import RankTable, encoding_by_name, round_trip
from cache.errors import (
    CorruptSegment,
    FormatError,
    InvalidInput,
    PotstillError,
    StoreError,
    TeacherFailed,
    Unavailable,
)
from cache.journal import Journal, JournalPolicy, JournalRow
from cache.targets import TargetSet, has_targets
from cache.types import Fields, Provenance, Targets, Teacher, TeacherIdentity, TeacherLimits, Tokens

_LOG = logging.getLogger(__name__)

# How often the store is asked for target sets that began since; a shard's commit is looked up at once.
_REFRESH_SECONDS = 2.0
_FLUSH_CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPolicy:
    """What is kept of a scored row, and when it is written.

    Raises:
        InvalidInput: k below 1 or an unknown encoding.
    """

    k: int = 64
    """Misses are scored with at least this K, so that a later, larger wish up to it is a hit."""
    encoding: str = "u8"
    segment_positions: int = 65_536
    segment_seconds: float = 10.0

    def __post_init__(self) -> None:
        Fields(k=self.k)
        encoding_by_name(self.encoding)


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Rows answered since the start: from the cache, by the teacher, by another caller's score in flight."""

    hits: int = 0
    misses: int = 0
    joined: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows of one caller's misses on their way through the teacher behind."""

    keep: Fields
    rows: dict[bytes, Tokens]
    answers: asyncio.Future[dict[bytes, Targets]]
    task: asyncio.Task[None] | None = None
    waiters: int = 0

    @property
    def dropped(self) -> bool:
        """Whether it is being cancelled, because its last waiter left."""
        return self.task is not None and self.task.cancelling() > 0

    def fail(self, error: PotstillError) -> None:
        """Tell every waiter, unless there is an answer already."""
        if not self.answers.done():
            self.answers.set_exception(error)
            self.answers.exception()  # retrieved: a caller that has left will not


class CachedTeacher:
    """A `Teacher` in front of another one. Open with `open`, which also closes it."""

    def __init__(self, inner: Teacher, name: str, cache: Cache, policy: KeepPolicy) -> None:
        self.inner = inner
        self.counters = CacheCounters()
        self.store_error = ""
        """Why rows could not be kept lately; empty when all is well."""
        self._name = name
        self._cache = cache
        self._policy = policy
        self._encoding = encoding_by_name(policy.encoding)
        self._ranks = RankTable.plain(inner.identity.vocab_size)
        self._in_flight: dict[bytes, list[_Batch]] = {}
        self._sets: list[TargetSet] = []
        self._strangers: set[str] = set()
        self._sets_read = float("-inf")
        journal_policy = JournalPolicy(
            encoding=policy.encoding,
            segment_positions=policy.segment_positions,
            segment_seconds=policy.segment_seconds,
        )
        self._journal = Journal(cache.root, name, inner.identity, journal_policy)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, inner: Teacher, *, name: str, cache: Cache, policy: KeepPolicy | None = None
    ) -> AsyncIterator[CachedTeacher]:
        """Open in front of `inner`; on leaving, waiting rows are stored. `inner` stays open.

        Raises:
            InvalidInput: the cache was opened to read.
        """
        if cache.mode != "r+":
            raise InvalidInput(f"cache {cache.root.url!r} was opened to read; a service needs mode 'r+'")
        teacher = await asyncio.to_thread(cls, inner, name, cache, policy or KeepPolicy())
        flushing = asyncio.create_task(teacher._flush_forever())  # noqa: SLF001 -- its own class
        try:
            yield teacher
        finally:
            flushing.cancel()
            await asyncio.gather(flushing, return_exceptions=True)
            await teacher._finish()  # noqa: SLF001 -- its own class

    @property
    def identity(self) -> TeacherIdentity:
        """The identity of the teacher behind."""
        return self.inner.identity

    @property
    def provenance(self) -> Provenance:
        """The provenance of the teacher behind."""
        return self.inner.provenance

    @property
    def limits(self) -> TeacherLimits:
        """The limits of the teacher behind."""
        return self.inner.limits

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """One `Targets` per row, in order, with exactly `want.k` entries.

        Raises:
            UnsupportedField: more than the top-k is asked for. What the teacher behind raises on a miss.
        """
        want.require_only_top_k("the cache")
        keys = [row_key(self.identity.tokenizer_sha256, row) for row in rows]
        found = await asyncio.to_thread(self._find_all, keys, want.k)
        # A score may have ended while we looked: nothing may come between seeing that it did not and joining.
        while any(kept is None and self._journal.holds(key, want.k) for key, kept in zip(keys, found, strict=True)):
            found = await asyncio.to_thread(self._find_all, keys, want.k)
        missing = {key: row for key, row, targets in zip(keys, rows, found, strict=True) if targets is None}
        batches, misses = self._join_or_score(missing, want)
        self._count(hits=len(rows) - found.count(None), misses=misses, rows=len(rows))
        answers = await self._wait_for(batches)
        return [
            (targets if targets is not None else answers[key]).prefix(want.k)
            for key, targets in zip(keys, found, strict=True)
        ]

    def _count(self, *, hits: int, misses: int, rows: int) -> None:
        old = self.counters
        joined = old.joined + rows - hits - misses
        self.counters = CacheCounters(hits=old.hits + hits, misses=old.misses + misses, joined=joined)

    def _join_or_score(self, missing: dict[bytes, Tokens], want: Fields) -> tuple[dict[bytes, _Batch], int]:
        """The batch that scores each missing row, and how many of the rows nobody scored yet."""
        limit = min(self.identity.vocab_size, self.limits.max_top_k or self.identity.vocab_size)
        keep = replace(want, k=max(want.k, min(self._policy.k, limit)))
        batches = {key: batch for key in missing if (batch := self._joinable(key, keep.k)) is not None}
        mine = {key: row for key, row in missing.items() if key not in batches}
        if mine:
            batch = _Batch(keep, mine, asyncio.get_running_loop().create_future())
            for key in mine:
                self._in_flight.setdefault(key, []).append(batch)
                batches[key] = batch
            batch.task = asyncio.create_task(self._score_batch(batch))
        return batches, len(mine)

    def _joinable(self, key: bytes, k: int) -> _Batch | None:
        """Of the batches that score this row with enough entries, the one with the fewest: as the journal will."""
        enough = (batch for batch in self._in_flight.get(key, ()) if batch.keep.k >= k and not batch.dropped)
        return min(enough, key=lambda batch: batch.keep.k, default=None)

    async def _wait_for(self, batches: dict[bytes, _Batch]) -> dict[bytes, Targets]:
        """The answers by key. A caller that leaves fails nobody; a batch that nobody waits for is dropped."""
        different = list(dict.fromkeys(batches.values()))
        for batch in different:
            batch.waiters += 1
        try:
            return {key: (await asyncio.shield(batch.answers))[key] for key, batch in batches.items()}
        finally:
            for batch in different:
                batch.waiters -= 1
                if not batch.waiters and batch.task is not None:
                    batch.task.cancel()

    async def _score_batch(self, batch: _Batch) -> None:
        try:
            exact = await self.inner.score(list(batch.rows.values()), batch.keep)
            answers = await asyncio.to_thread(self._through_encoding, exact)
            kept = zip(batch.rows.items(), exact, answers, strict=True)
            # In the journal before it is answered: a row is never scored twice in between.
            self._journal.add([JournalRow(key, row, scored, answer) for (key, row), scored, answer in kept])
            batch.answers.set_result(dict(zip(batch.rows, answers, strict=True)))
        except PotstillError as error:
            batch.fail(error)
        except asyncio.CancelledError:
            batch.fail(Unavailable("scoring was stopped before there was an answer; ask again"))
            raise
        finally:
            # What else ended it is a bug, which the task reports; its callers must not hang.
            batch.fail(TeacherFailed("the teacher ended without an answer; the service's log says why"))
            for key in batch.rows:
                self._in_flight[key].remove(batch)
                if not self._in_flight[key]:
                    del self._in_flight[key]

    def _through_encoding(self, targets: list[Targets]) -> list[Targets]:
        return [round_trip(row, self._encoding, self._ranks) for row in targets]

    def _find_all(self, keys: list[bytes], k: int) -> list[Targets | None]:
        return [self._find(key, k) for key in keys]

    def _find(self, key: bytes, k: int) -> Targets | None:
        """What is kept of a row; damaged targets count as a miss here and as an error in `verify`."""
        try:
            kept = self._journal.find(key, k)
            return kept if kept is not None else self._find_in_corpora(key, k)
        except (CorruptSegment, FormatError, StoreError) as error:
            self._trouble(error)
            return None

    def _find_in_corpora(self, key: bytes, k: int) -> Targets | None:
        self._refresh_sets()
        for targets in self._sets:
            if targets.fields.k < k:
                continue
            row = targets.corpus.find([key])[0]
            if row is None:
                continue
            if targets.commit_of(targets.corpus.shard_of_row(row)) is not None:
                return targets.read_rows([row])[0]
        return None

    def _refresh_sets(self) -> None:
        now = time.monotonic()
        if now - self._sets_read < _REFRESH_SECONDS:
            return
        self._sets_read = now
        known = {targets.corpus.name for targets in self._sets}
        for corpus in self._cache.corpora():
            if corpus in known or not has_targets(self._cache.root, self._name, corpus):
                continue
            try:
                targets = self._cache.targets(self._name, corpus)
            except PotstillError as error:
                self._trouble(error)
                continue
            differences = targets.identity.differences(self.identity)
            if not differences:
                self._sets = [*self._sets, targets]
            elif corpus not in self._strangers:
                self._strangers.add(corpus)
                _LOG.warning("teacher %s: its targets of corpus %s are not used: %s", self._name, corpus, differences)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_CHECK_SECONDS)
            if self._journal.due():
                await self._flush()

    async def _flush(self) -> None:
        try:
            await asyncio.to_thread(self._journal.flush, self.provenance)
            self.store_error = ""
        except PotstillError as error:
            # The answers were given; the rows wait for the next try.
            self._trouble(error)

    def _trouble(self, error: PotstillError) -> None:
        """Keep serving, and say once what is wrong with the store."""
        if self.store_error != error.detail:
            self.store_error = error.detail
            _LOG.warning("teacher %s: %s", self._name, error.detail)

    async def _finish(self) -> None:
        batches = {batch for waiting in self._in_flight.values() for batch in waiting}
        tasks = [batch.task for batch in batches if batch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._flush()
