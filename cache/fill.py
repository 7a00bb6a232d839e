"""The one prefill loop: uncommitted shards -> batches by token budget -> score -> write behind -> commit.

Batches of the next shard are scored while the last shard is encoded and written. A shard is committed
whole or not at all, so a run that stops anywhere goes on with the shards that have no commit.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cache.errors import InvalidInput, TeacherFailed
from cache.targets import TargetSet
from cache.types import Targets, Teacher, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FillPlan:
    """How work is handed to the teacher.

    Raises:
        InvalidInput: a number below 1.
    """

    batch_tokens: int = 8192
    """Rows are scored in batches of at most this many tokens (one row at least)."""
    in_flight: int = 2
    """Batches that wait at the teacher at one time; also bounds what is held in memory ahead of a shard."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "in_flight"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class FillProgress:
    """How far a fill is, counted over this run's shards only."""

    positions_scored: int
    positions: int
    shards_committed: int
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FillReport:
    """What a finished fill did."""

    shards_committed: int
    shards_lost: int
    """Shards that another writer committed while this one scored them; theirs stand."""
    shards_before: int
    """Shards that had a commit when the run began."""
    positions_scored: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Batch:
    shard: int
    rows: list[Tokens]
    last: bool
    """Whether it completes its shard."""


async def fill(
    teacher: Teacher,
    targets: TargetSet,
    plan: FillPlan,
    *,
    on_progress: Callable[[FillProgress], None] = lambda _: None,
) -> FillReport:
    """Score and commit every shard of `targets` that has no commit.

    When cancelled, scoring stops at once; a shard whose write has begun is still committed.

    Raises:
        StoreError: the store is full or cannot be written; committed shards stay, the rest stays uncommitted.
        LimitExceeded, TeacherFailed, Unavailable and others: what the teacher raises.
    """
    began = time.monotonic()
    committed = targets.committed
    shards = np.flatnonzero(~committed).tolist()
    run = _Run(teacher, targets, shards, on_progress)
    try:
        await run.score_all(plan)
    finally:
        await run.finish_writing()
    return FillReport(
        shards_committed=run.shards_committed,
        shards_lost=run.shards_lost,
        shards_before=int(committed.sum()),
        positions_scored=run.positions_scored,
        seconds=time.monotonic() - began,
    )


class _Run:
    """State of one fill: batches in flight, the shard being gathered, the shard being written."""

    def __init__(
        self,
        teacher: Teacher,
        targets: TargetSet,
        shards: list[int],
        on_progress: Callable[[FillProgress], None],
    ) -> None:
        self._teacher = teacher
        self._targets = targets
        self._shards = shards
        self._on_progress = on_progress
        self._gathered: list[Targets] = []
        self._writing: asyncio.Task[None] | None = None
        lengths = np.diff(targets.corpus.shard_starts)
        self._positions = int(lengths[shards].sum())
        self.positions_scored = 0
        self.shards_committed = 0
        self.shards_lost = 0

    async def score_all(self, plan: FillPlan) -> None:
        """Keep `in_flight` batches at the teacher and take their answers in order."""
        batches = self._batches(plan.batch_tokens)
        waiting: deque[tuple[_Batch, asyncio.Task[list[Targets]]]] = deque()
        try:
            while True:
                while len(waiting) < plan.in_flight:
                    batch = await asyncio.to_thread(next, batches, None)
                    if batch is None:
                        break
                    task = asyncio.create_task(self._teacher.score(batch.rows, self._targets.fields))
                    waiting.append((batch, task))
                if not waiting:
                    return
                batch, task = waiting.popleft()
                try:
                    await self._take(batch, await task)
                except BaseException:
                    task.cancel()
                    raise
        finally:
            for _, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)

    async def finish_writing(self) -> None:
        """Wait for the write under way, also when cancelled meanwhile; a cancellation is passed on after it."""
        cancelled = False
        while self._writing is not None and not self._writing.done():
            try:
                await asyncio.wait([self._writing])
            except asyncio.CancelledError:
                cancelled = True
        self._written()
        if cancelled:
            raise asyncio.CancelledError

    def _written(self) -> None:
        """Raise what the last write raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    async def _take(self, batch: _Batch, answers: list[Targets]) -> None:
        wanted = [(len(row), self._targets.fields.k) for row in batch.rows]
        if [(answer.num_positions, answer.k) for answer in answers] != wanted:
            raise TeacherFailed("the teacher answered other rows, positions or k than it was asked for")
        self._gathered.extend(answers)
        self.positions_scored += sum(map(len, batch.rows))
        if batch.last:
            if self._writing is not None:
                await asyncio.shield(self._writing)
                self._written()
            shard_targets, self._gathered = self._gathered, []
            self._writing = asyncio.create_task(self._write(batch.shard, shard_targets))
        self._report()

    async def _write(self, shard: int, parts: list[Targets]) -> None:
        provenance = self._teacher.provenance

        def write() -> bool:
            return self._targets.write_shard(shard, Targets.concat(parts), provenance) is not None

        won = await asyncio.to_thread(write)
        self.shards_committed += won
        self.shards_lost += not won
        self._report()

    def _report(self) -> None:
        done = self.shards_committed + self.shards_lost
        self._on_progress(FillProgress(self.positions_scored, self._positions, done, len(self._shards)))

    def _batches(self, batch_tokens: int) -> Iterator[_Batch]:
        corpus = self._targets.corpus
        for shard in self._shards:
            if self._targets.commit_of(shard) is not None:
                self.shards_lost += 1  # another job was faster: its shard is not scored again
                continue
            start, stop = (int(row) for row in corpus.shard_rows[shard : shard + 2])
            while start < stop:
                limit = corpus.row_starts[start] + batch_tokens
                fitting = int(np.searchsorted(corpus.row_starts, limit, side="right")) - 1
                end = min(max(fitting, start + 1), stop)
                yield _Batch(shard, corpus.rows(start, end), end == stop)
                start = end
