"""CachedTeacher: a teacher behind what is already known of it.

A row is looked for in the journal, then in every corpus that has committed targets of the same teacher and
identity (`known_targets`); of those with enough entries the fewest answer. Only a miss reaches the teacher
behind, once, however many callers wait for it. A miss is answered through the journal's encoding, so that the answer
is what a later hit returns.

Only the top-k is kept of what is asked for here. A wish for draws, entropy, temperatures or dense logprobs is answered
by corpora that hold exactly these fields (the same draws, seed and temperatures); what they do not hold is passed on to
the teacher behind, whose answer is exact, not kept and not shared between callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from potstill.cache.cache import Cache
from potstill.cache.corpus.keys import row_key
from potstill.cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    PotstillError,
    TeacherFailed,
    Unavailable,
)
from potstill.cache.journal.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import JournalRow
from potstill.cache.read_through.known_targets import KnownTargets
from potstill.cache.types import Fields, Targets, Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher

_LOG = logging.getLogger(__name__)

_FLUSH_CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPolicy(JournalPolicy):
    """What is kept of a scored row, and when it is written.

    Raises:
        InvalidInput: k below 1, an encoding that journals do not use, or a negative quota.
    """

    k: int = 64
    """Misses are scored with at least this K, so that a later, larger wish up to it is a hit."""
    tidy_seconds: float = 30.0
    """How often the journals are kept within the quota and small segments joined."""

    def __post_init__(self) -> None:
        JournalPolicy.__post_init__(self)  # `super()` does not know a class with slots
        if self.k < 1:
            raise InvalidInput(f"k is {self.k}; it must be at least 1")


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


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows that were looked up, with what is kept of each."""

    rows: Sequence[Tokens]
    keys: Sequence[bytes]
    want: Fields
    found: Sequence[Targets | None]

    @property
    def missing(self) -> dict[bytes, Tokens]:
        """Row key -> row of what is not kept."""
        looked_up = zip(self.keys, self.rows, self.found, strict=True)
        return {key: row for key, row, targets in looked_up if targets is None}


class CachedTeacher(WrappedTeacher):
    """A `Teacher` in front of another one. Open with `open`, which also closes it."""

    def __init__(self, inner: Teacher, name: str, cache: Cache, policy: KeepPolicy) -> None:
        super().__init__(inner)
        self.counters = CacheCounters()
        self.store_error = ""
        """Why rows could not be kept lately; empty when all is well."""
        self._name = name
        self._cache = cache
        self.policy = policy
        """What is kept, and when it is written."""
        self._in_flight: dict[bytes, list[_Batch]] = {}
        # By lookup on its way: keys of rows that came into the journal meanwhile.
        self._landed: dict[object, set[bytes]] = {}
        self._closing = False
        self._journal = Journal(cache.root, name, inner.identity, policy, self._trouble)
        self._known = KnownTargets(cache, name, inner.identity, self._trouble)
        self._losses = self._journal.index.losses
        # A thread keeps the memory that it freed (glibc's arenas): in any of asyncio's, all would come to keep as much.
        self._flusher = ThreadPoolExecutor(1, f"flush-{name}")
        self._tidier = ThreadPoolExecutor(1, f"tidy-{name}")

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
        forever = (teacher._flush_forever(), teacher._tidy_forever())  # noqa: SLF001 -- its own class
        tasks = [asyncio.create_task(work) for work in forever]
        try:
            yield teacher
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await teacher._finish()  # noqa: SLF001 -- its own class

    @property
    def journal_bytes(self) -> int:
        """Stored in the journals of all processes for this teacher, as of the last tidying."""
        return self._journal.stored_bytes

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """One `Targets` per row, in order, with exactly `want.k` entries.

        Raises:
            What the teacher behind raises on a miss.
        """
        return await self.complete(await self.look_up(rows, want))

    async def look_up(self, rows: Sequence[Tokens], want: Fields) -> Lookup:
        """Look for each row in the journal and the corpora; nothing is scored."""
        keys = [row_key(self.identity.tokenizer_sha256, row) for row in rows]
        kept = self._look(keys, want) if want.only_top_k else asyncio.to_thread(self._known.find, keys, want)
        return Lookup(rows, keys, want, await kept)

    async def complete(self, lookup: Lookup) -> list[Targets]:
        """Answer all rows of a lookup, scoring those that are missing.

        To be awaited right after `look_up`: a score that ends in between is not seen, and its rows are scored again.

        Raises:
            What the teacher behind raises on a miss.
        """
        keys, want, found, missing = lookup.keys, lookup.want, lookup.found, lookup.missing
        if not want.only_top_k:
            return await self._complete_beyond_top_k(lookup)
        repeated = found.count(None) - len(missing)
        self._count(hits=len(keys) - found.count(None), joined=repeated)
        answers = await self._score(missing, want)
        # What was refused to another caller is asked for once more together with others, then alone.
        for join in (True, False):
            refused = {key: row for key, row in missing.items() if key not in answers}
            if not refused:
                break
            kept = await self._look(list(refused), want)
            answers |= {key: targets for key, targets in zip(refused, kept, strict=True) if targets is not None}
            left = {key: row for key, row in refused.items() if key not in answers}
            answers |= await self._score(left, want, join=join)
        return [
            (targets if targets is not None else answers[key]).prefix(want.k)
            for key, targets in zip(keys, found, strict=True)
        ]

    async def _score(self, rows: dict[bytes, Tokens], want: Fields, *, join: bool = True) -> dict[bytes, Targets]:
        """Answers by key, but for rows that were refused to the caller whose score was joined."""
        batches, mine = self._join_or_score(rows, want, join=join)
        num_mine = 0 if mine is None else len(mine.rows)
        self._count(misses=num_mine)
        answers = await self._wait_for(batches, mine)
        self._count(joined=len(answers) - num_mine)
        return answers

    async def _complete_beyond_top_k(self, lookup: Lookup) -> list[Targets]:
        """Answer more than the top-k: what no corpus has comes from the teacher behind as it answers."""
        missing = [row for row, targets in zip(lookup.rows, lookup.found, strict=True) if targets is None]
        scored = iter(await self.inner.score(missing, lookup.want) if missing else [])
        self._count(hits=len(lookup.rows) - len(missing), misses=len(missing))
        return [targets if targets is not None else next(scored) for targets in lookup.found]

    async def _look(self, keys: list[bytes], want: Fields) -> list[Targets | None]:
        """What is kept of each row. A score that ends while we look is seen: nothing comes between that and joining."""
        while True:
            look = object()
            landed = self._landed[look] = set()
            try:
                found = await asyncio.to_thread(self._find_all, keys, want)
            finally:
                del self._landed[look]
            if not any(kept is None and key in landed for key, kept in zip(keys, found, strict=True)):
                return found

    def _count(self, *, hits: int = 0, misses: int = 0, joined: int = 0) -> None:
        old = self.counters
        self.counters = CacheCounters(old.hits + hits, old.misses + misses, old.joined + joined)

    def _join_or_score(
        self, missing: dict[bytes, Tokens], want: Fields, *, join: bool = True
    ) -> tuple[dict[bytes, _Batch], _Batch | None]:
        """The batch that scores each missing row, and the one of them with the rows that nobody scored yet."""
        limit = min(self.identity.vocab_size, self.limits.max_top_k or self.identity.vocab_size)
        keep = replace(want, k=max(want.k, min(self.policy.k, limit)))
        batches = {key: batch for key in missing if join and (batch := self._joinable(key, keep.k)) is not None}
        mine = {key: row for key, row in missing.items() if key not in batches}
        batch = None
        if mine:
            batch = _Batch(keep, mine, asyncio.get_running_loop().create_future())
            for key in mine:
                self._in_flight.setdefault(key, []).append(batch)
                batches[key] = batch
            batch.task = asyncio.create_task(self._score_batch(batch))
        return batches, batch

    def _joinable(self, key: bytes, k: int) -> _Batch | None:
        """Of the batches that score this row with enough entries, the one with the fewest: as the journal will."""
        enough = (batch for batch in self._in_flight.get(key, ()) if batch.keep.k >= k and not batch.dropped)
        return min(enough, key=lambda batch: batch.keep.k, default=None)

    async def _wait_for(self, batches: dict[bytes, _Batch], mine: _Batch | None = None) -> dict[bytes, Targets]:
        """The answers by key. A caller that leaves fails nobody; a batch that nobody waits for is dropped.

        Rows that were only joined are left out when they were refused for the sake of who asked first.
        """
        different = list(dict.fromkeys(batches.values()))
        answers: dict[bytes, Targets] = {}
        for batch in different:
            batch.waiters += 1
        try:
            for batch in different:
                try:
                    scored = await asyncio.shield(batch.answers)
                except PotstillError as error:
                    if batch is mine or self._closing or not _of_caller(error):
                        raise
                    continue
                answers |= {key: scored[key] for key, its in batches.items() if its is batch}
        finally:
            for batch in different:
                batch.waiters -= 1
                if not batch.waiters and batch.task is not None:
                    batch.task.cancel()
        return answers

    async def _score_batch(self, batch: _Batch) -> None:
        try:
            exact = await self.inner.score(list(batch.rows.values()), batch.keep)
            rows, answers = await asyncio.to_thread(self._through_encoding, batch.rows, exact)
            # In the journal before it is answered: a row is never scored twice in between.
            self._journal.add(rows)
            for landed in self._landed.values():
                landed.update(batch.rows)
            batch.answers.set_result(dict(zip(batch.rows, answers, strict=True)))
        except PotstillError as error:
            batch.fail(error)
        except asyncio.CancelledError:
            batch.fail(Unavailable("scoring was stopped before there was an answer; ask again"))
            raise
        finally:
            if not batch.answers.done():
                # What else ended it is a bug, which the task reports; its callers must not hang.
                batch.fail(TeacherFailed("the teacher ended without an answer; the service's log says why"))
            for key in batch.rows:
                self._in_flight[key].remove(batch)
                if not self._in_flight[key]:
                    del self._in_flight[key]

    def _through_encoding(
        self, rows: dict[bytes, Tokens], exact: list[Targets]
    ) -> tuple[list[JournalRow], list[Targets]]:
        encoding, ranks = self._journal.encoding, self._journal.ranks
        scored = zip(rows.items(), exact, strict=True)
        kept = [JournalRow.of(key, row, targets, encoding, ranks) for (key, row), targets in scored]
        return [row for row, _ in kept], [answer for _, answer in kept]

    def _find_all(self, keys: list[bytes], want: Fields) -> list[Targets | None]:
        """What is kept of rows; damaged targets count as a miss here and as an error in `verify`."""
        found = self._journal.find(keys, want.k)
        if self._losses != self._journal.index.losses:
            # Rows that left the journal may be in a corpus that was made of it just now.
            self._losses = self._journal.index.losses
            self._known.look_again()
        # Of all that is kept of a row the fewest entries answer: as before they moved into a corpus.
        held = [None if targets is None else targets.k for targets in found]
        left = [i for i, k in enumerate(held) if k is None or k > want.k]
        if left:
            committed = self._known.find([keys[i] for i in left], want, [held[i] for i in left])
            for i, targets in zip(left, committed, strict=True):
                found[i] = found[i] if targets is None else targets
        return found

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_CHECK_SECONDS)
            if self._journal.due():
                await self._flush()

    async def _flush(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._flusher, self._journal.flush, self.provenance)
            self.store_error = ""
        except PotstillError as error:
            # The answers were given; the rows wait for the next try.
            self._trouble(error)

    async def _tidy_forever(self) -> None:
        while True:
            await asyncio.sleep(self.policy.tidy_seconds)
            try:
                await asyncio.get_running_loop().run_in_executor(self._tidier, self._journal.tidy)
            except PotstillError as error:
                self._trouble(error)

    def _trouble(self, error: PotstillError) -> None:
        """Keep serving, and say once what is wrong with the store."""
        if self.store_error != error.detail:
            self.store_error = error.detail
            _LOG.warning("teacher %s: %s", self._name, error.detail)

    async def _finish(self) -> None:
        self._closing = True
        batches = {batch for waiting in self._in_flight.values() for batch in waiting}
        tasks = [batch.task for batch in batches if batch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._flush()
        await asyncio.to_thread(self._journal.close)
        self._flusher.shutdown()
        self._tidier.shutdown()


def _of_caller(error: PotstillError) -> bool:
    """Whether another caller might not be refused: its place in the queue, quota and deadline are others."""
    return error.retryable or isinstance(error, DeadlineExceeded | LimitExceeded)
