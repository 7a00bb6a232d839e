"""CachedTeacher: a teacher with the journal and the corpora of a cache in front of it.

A row is looked up in the journal, then in every corpus that has committed targets of the same teacher and identity
(`known_targets`); of the places with enough entries, the one with the fewest answers. Only a miss reaches the inner
teacher, once, however many callers wait for it. The answer to a miss goes through the journal's encoding, so that it
equals what a later hit returns.

Only the top-k is kept. Draws, entropy, log sums and dense logprobs are answered from corpora with exactly these fields
(the same number of draws, seed and temperatures); other rows go to the inner teacher, whose answer is then exact, and
neither kept nor shared between callers.
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
from potstill.cache.journal import Journal, JournalPolicy
from potstill.cache.journal.segment import JournalRow
from potstill.cache.read_through.known_targets import KnownTargets
from potstill.cache.types import Fields, Targets, Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher

_LOG = logging.getLogger(__name__)

_FLUSH_CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPolicy(JournalPolicy):
    """Limits of a journal, and the K with which rows are kept in it.

    Raises:
        InvalidInput: k is below 1, journals do not use the encoding, or the quota is negative.
    """

    k: int = 64
    """Fewest entries with which misses are scored, so that a later request for up to this K is a hit."""
    tidy_seconds: float = 30.0
    """Seconds between runs of `Journal.tidy`, which enforces the quota and joins small segments."""

    def __post_init__(self) -> None:
        JournalPolicy.__post_init__(self)  # `super()` does not know a class with slots
        if self.k < 1:
            raise InvalidInput(f"k is {self.k}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Counts of rows answered since the start: from the cache, by the teacher, and by another caller's request."""

    hits: int = 0
    misses: int = 0
    joined: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows that one caller missed, while the inner teacher scores them; other callers may wait for them too."""

    keep: Fields
    rows: dict[bytes, Tokens]
    answers: asyncio.Future[dict[bytes, Targets]]
    task: asyncio.Task[None] | None = None
    waiters: int = 0

    @property
    def dropped(self) -> bool:
        """True while it is being cancelled, because its last waiter left."""
        return self.task is not None and self.task.cancelling() > 0

    def fail(self, error: PotstillError) -> None:
        """Give every waiter the error, unless there is an answer already."""
        if not self.answers.done():
            self.answers.set_exception(error)
            self.answers.exception()  # retrieved: a caller that has left will not


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows that were looked up, with their kept targets or None."""

    rows: Sequence[Tokens]
    keys: Sequence[bytes]
    want: Fields
    found: Sequence[Targets | None]

    @property
    def missing(self) -> dict[bytes, Tokens]:
        """Rows that are not kept, by key; each once."""
        looked_up = zip(self.keys, self.rows, self.found, strict=True)
        return {key: row for key, row, targets in looked_up if targets is None}


class CachedTeacher(WrappedTeacher):
    """A `Teacher` that answers from a cache what it can; opened and closed by the context manager `open`."""

    def __init__(self, inner: Teacher, name: str, cache: Cache, policy: KeepPolicy) -> None:
        super().__init__(inner)
        self.counters = CacheCounters()
        self.store_error = ""
        """Last error of the store in one line; empty when all is well."""
        self._name = name
        self._cache = cache
        self.policy = policy
        """Limits of the journal, and the K of kept rows."""
        self._in_flight: dict[bytes, list[_Batch]] = {}
        # By lookup on its way: keys of rows that came into the journal meanwhile.
        self._landed: dict[object, set[bytes]] = {}
        self._closing = False
        self._journal = Journal(cache.root, name, inner.identity, policy, self._trouble)
        self._known = KnownTargets(cache, name, inner.identity, self._trouble)
        self._losses = self._journal.index.losses
        # Threads of their own: a thread keeps memory that it freed (glibc's arenas), and in asyncio's pool every thread
        # would come to keep that of a flush.
        self._flusher = ThreadPoolExecutor(1, f"flush-{name}")
        self._tidier = ThreadPoolExecutor(1, f"tidy-{name}")

    @classmethod
    @asynccontextmanager
    async def open(
        cls, inner: Teacher, *, name: str, cache: Cache, policy: KeepPolicy | None = None
    ) -> AsyncIterator[CachedTeacher]:
        """Open a cache in front of `inner`. On leaving, waiting rows are stored; `inner` stays open.

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
        """Stored bytes of this teacher in the journals of all processes, as of the last `tidy`."""
        return self._journal.stored_bytes

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score rows: one `Targets` per row, in order, with exactly `want.k` entries.

        Raises:
            PotstillError: whatever the inner teacher raises on a miss.
        """
        return await self.complete(await self.look_up(rows, want))

    async def look_up(self, rows: Sequence[Tokens], want: Fields) -> Lookup:
        """Look each row up in the journal and the corpora; nothing is scored."""
        keys = [row_key(self.identity.tokenizer_sha256, row) for row in rows]
        kept = self._look(keys, want) if want.only_top_k else asyncio.to_thread(self._known.find, keys, want)
        return Lookup(rows, keys, want, await kept)

    async def complete(self, lookup: Lookup) -> list[Targets]:
        """Answer all rows of a look-up, scoring those that are missing.

        Await it right after `look_up`: rows that another caller's score adds in between are scored again.

        Raises:
            PotstillError: whatever the inner teacher raises on a miss.
        """
        keys, want, found, missing = lookup.keys, lookup.want, lookup.found, lookup.missing
        if not want.only_top_k:
            return await self._complete_beyond_top_k(lookup)
        repeated = found.count(None) - len(missing)
        self._count(hits=len(keys) - found.count(None), joined=repeated)
        answers = await self._score(missing, want)
        # A row that was refused to the caller whose request we joined may be granted to us: try once more together with
        # others, then alone, where a refusal is ours.
        for join in (True, False):
            refused = {key: row for key, row in missing.items() if key not in answers}
            if not refused:
                break
            kept = await self._look(list(refused), want)
            answers |= {key: targets for key, targets in zip(refused, kept, strict=True) if targets is not None}
            left = {key: row for key, row in refused.items() if key not in answers}
            answers |= await self._score(left, want, join=join)
        # More entries may be kept, or scored, than were asked for.
        return [
            (targets if targets is not None else answers[key]).prefix(want.k)
            for key, targets in zip(keys, found, strict=True)
        ]

    async def _score(self, rows: dict[bytes, Tokens], want: Fields, *, join: bool = True) -> dict[bytes, Targets]:
        """Score rows or join other callers' requests; answers by key, without rows refused to those callers."""
        batches, mine = self._join_or_score(rows, want, join=join)
        num_mine = 0 if mine is None else len(mine.rows)
        self._count(misses=num_mine)
        answers = await self._wait_for(batches, mine)
        self._count(joined=len(answers) - num_mine)
        return answers

    async def _complete_beyond_top_k(self, lookup: Lookup) -> list[Targets]:
        """Answer more than the top-k: rows that no corpus has come unchanged from the inner teacher."""
        missing = [row for row, targets in zip(lookup.rows, lookup.found, strict=True) if targets is None]
        scored = iter(await self.inner.score(missing, lookup.want) if missing else [])
        self._count(hits=len(lookup.rows) - len(missing), misses=len(missing))
        return [targets if targets is not None else next(scored) for targets in lookup.found]

    async def _look(self, keys: list[bytes], want: Fields) -> list[Targets | None]:
        """Find the kept targets of each row, or None."""
        # The search runs in a thread, and a score that ends meanwhile may be missed by it: then search again. After
        # the return nothing is awaited before a request is joined, so no score can end unseen.
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
        """The batch that scores each missing row, and the new batch among them, with rows that none scored yet."""
        # Our own K must not exceed what the teacher can answer: it would refuse a small request.
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
        """The batch in flight that scores a row with enough entries; of several the fewest, as the journal chooses."""
        enough = (batch for batch in self._in_flight.get(key, ()) if batch.keep.k >= k and not batch.dropped)
        return min(enough, key=lambda batch: batch.keep.k, default=None)

    async def _wait_for(self, batches: dict[bytes, _Batch], mine: _Batch | None = None) -> dict[bytes, Targets]:
        """Wait for batches; answers by key. A caller that leaves fails nobody; a batch without waiters is cancelled.

        Rows of joined batches are left out when the refusal was meant for the caller that asked first.
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
            # Into the journal before the answer: otherwise the row could be scored a second time in between.
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
                # Another exception is a bug, which the task reports; the callers must not hang on it.
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
        """Find rows in the journal, then in corpora; damaged targets count as a miss here, as an error in `verify`."""
        found = self._journal.find(keys, want.k)
        if self._losses != self._journal.index.losses:
            # Rows that left the journal may be in a corpus that was made of it just now.
            self._losses = self._journal.index.losses
            self._known.look_again()
        # The fewest entries answer, in a corpus as in the journal: so an answer stays the same when its row moves.
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
            # Callers have their answers already; the rows wait for the next try.
            self._trouble(error)

    async def _tidy_forever(self) -> None:
        while True:
            await asyncio.sleep(self.policy.tidy_seconds)
            try:
                await asyncio.get_running_loop().run_in_executor(self._tidier, self._journal.tidy)
            except PotstillError as error:
                self._trouble(error)

    def _trouble(self, error: PotstillError) -> None:
        """Log an error of the store, once, and keep serving."""
        if self.store_error != error.detail:
            self.store_error = error.detail
            _LOG.warning("teacher %s: %s", self._name, error.detail)

    async def _finish(self) -> None:
        # Scores are stopped first, so that nothing comes into the journal after its last flush.
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
    """Tell whether another caller may fare better: its place in the queue, its quota and its deadline differ."""
    return error.retryable or isinstance(error, DeadlineExceeded | LimitExceeded)
