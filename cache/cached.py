"""CachedTeacher: a teacher behind what is already known of it.

A row is looked for in the journal, then in every corpus that has committed targets of the same teacher and
identity; only a miss reaches the teacher behind, once, however many callers wait for it. A miss is answered
through the journal's encoding, so that the answer is what a later hit returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cache.cache import Cache
from cache.corpus import row_key
from cache.encoding import RankTable, encoding_by_name, round_trip
from cache.errors import CorruptSegment, InvalidInput, PotstillError, StoreError, Unavailable
from cache.journal import Journal, JournalPolicy, JournalRow
from cache.targets import TargetSet, has_targets
from cache.types import Fields, Provenance, Targets, Teacher, TeacherIdentity, TeacherLimits, Tokens

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
        self._in_flight: dict[tuple[bytes, int], asyncio.Future[Targets]] = {}
        self._scoring: set[asyncio.Task[None]] = set()
        self._sets: list[TargetSet] = []
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
        hits = sum(targets is not None for targets in found)
        missing = {key: row for key, row, targets in zip(keys, rows, found, strict=True) if targets is None}
        futures, scored = self._join_or_score(missing, want)
        new = len(scored)
        self.counters = replace(
            self.counters,
            hits=self.counters.hits + hits,
            misses=self.counters.misses + new,
            joined=self.counters.joined + len(rows) - hits - new,
        )
        # A cancelled caller must not cancel what others wait for.
        answers = {key: await asyncio.shield(future) for key, future in futures.items()}
        return [
            (targets if targets is not None else answers[key]).prefix(want.k)
            for key, targets in zip(keys, found, strict=True)
        ]

    def _join_or_score(
        self, missing: dict[bytes, Tokens], want: Fields
    ) -> tuple[dict[bytes, asyncio.Future[Targets]], dict[bytes, Tokens]]:
        """The future of every missing row; rows that nobody scores yet are handed to the teacher."""
        limit = min(self.identity.vocab_size, self.limits.max_top_k or self.identity.vocab_size)
        keep = replace(want, k=max(want.k, min(self._policy.k, limit)))
        loop = asyncio.get_running_loop()
        futures: dict[bytes, asyncio.Future[Targets]] = {}
        mine: dict[bytes, Tokens] = {}
        for key, row in missing.items():
            future = self._in_flight.get((key, keep.k))
            if future is None:
                future = self._in_flight[key, keep.k] = loop.create_future()
                mine[key] = row
            futures[key] = future
        if mine:
            task = asyncio.create_task(self._score_missing(mine, keep))
            self._scoring.add(task)
            task.add_done_callback(self._scoring.discard)
        return futures, mine

    async def _score_missing(self, missing: dict[bytes, Tokens], keep: Fields) -> None:
        try:
            targets = await self.inner.score(list(missing.values()), keep)
            answers = await asyncio.to_thread(self._through_encoding, targets)
            kept = zip(missing.items(), answers, strict=True)
            # In the journal before it leaves the futures: a row is never scored twice in between.
            self._journal.add([JournalRow(key, row, answer) for (key, row), answer in kept])
            for key, answer in zip(missing, answers, strict=True):
                self._settle(key, keep.k, answer)
        except PotstillError as error:
            self._fail(missing, keep.k, error)
        finally:
            # Whatever ended the scoring, its callers must not hang: settled rows are not touched.
            self._fail(missing, keep.k, Unavailable("scoring was stopped before there was an answer; ask again"))

    def _settle(self, key: bytes, k: int, answer: Targets) -> None:
        future = self._in_flight.pop((key, k))
        if not future.done():
            future.set_result(answer)

    def _fail(self, missing: dict[bytes, Tokens], k: int, error: PotstillError) -> None:
        for key in missing:
            future = self._in_flight.pop((key, k), None)
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: a cancelled caller will not

    def _through_encoding(self, targets: list[Targets]) -> list[Targets]:
        return [round_trip(row, self._encoding, self._ranks) for row in targets]

    def _find_all(self, keys: list[bytes], k: int) -> list[Targets | None]:
        return [self._find(key, k) for key in keys]

    def _find(self, key: bytes, k: int) -> Targets | None:
        """What is kept of a row; damaged targets count as a miss here and as an error in `verify`."""
        try:
            kept = self._journal.find(key, k)
            return kept if kept is not None else self._find_in_corpora(key, k)
        except (CorruptSegment, StoreError) as error:
            self.store_error = error.detail
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
                self.store_error = error.detail
                continue
            if targets.identity == self.identity:
                self._sets = [*self._sets, targets]

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_CHECK_SECONDS)
            if self._journal.due():
                await self._flush()

    async def _flush(self) -> None:
        try:
            await asyncio.to_thread(self._journal.flush, self.provenance)
            self.store_error = ""
        except StoreError as error:
            # The answers were given; the rows wait for the next try.
            self.store_error = error.detail

    async def _finish(self) -> None:
        for task in self._scoring:
            task.cancel()
        await asyncio.gather(*self._scoring, return_exceptions=True)
        await self._flush()
