"""The prefill loop: claim a shard, score it in batches of a token budget, write it behind the scoring, commit.

Batches of the next shard are scored while the last shard is encoded and written. A shard is committed whole or not
at all, so a run that was stopped goes on with the shards that have no commit. Any number of jobs fill one target set
together: each claims the shards it works on, and at the end waits for those of the others.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from potstill.cache.errors import InvalidInput, LimitExceeded, StoreError
from potstill.cache.fill.scoring import ScoringWindow, with_store_retries
from potstill.cache.fill.shard_queue import PILOT, ShardQueue
from potstill.cache.plurals import counted
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.store import Claims
from potstill.cache.store.claims import Claim
from potstill.cache.targets import TargetSet
from potstill.cache.types import Targets, Teacher, Tokens

# Targets of pilot rows that are kept until their shard comes; those over it are scored a second time.
_KEPT_PILOT_BYTES = 256 << 20
# Seconds between looks at the claims of other jobs.
_LONGEST_POLL = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FillPlan:
    """Sizes of the work handed to a teacher, and the time for which a silent job keeps its shards.

    Raises:
        InvalidInput: a number is below 1, or `claim_seconds` is not positive and finite.
    """

    batch_tokens: int = 8192
    """Most tokens of a batch; a longer row is a batch of its own."""
    in_flight: int = 2
    """Batches at the teacher at one time; also bounds how many targets are held in memory ahead of a shard."""
    claim_seconds: float = 120.0
    """Seconds without a sign of a job after which others take over its shards."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "in_flight"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.claim_seconds < float("inf"):
            raise InvalidInput(f"--claim-seconds is {self.claim_seconds}; it must be a positive number of seconds")


@dataclass(frozen=True, slots=True)
class FillProgress:
    """Progress of a fill, over the shards that it found uncommitted and that no other job has committed since."""

    positions_scored: int
    positions: int
    shards_committed: int
    shards: int
    positions_unkept: int = 0
    """Positions that were scored, and are lost if the fill stops now: their shards are not complete."""
    waiting_for: int = 0
    """Shards of other jobs that this one waits for, when it has nothing else to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillReport:
    """Outcome of a finished fill."""

    shards_committed: int
    shards_lost: int
    """Shards that this job scored, partly or whole, but that another took over; the other's commits stand."""
    shards_elsewhere: int
    """Shards that other jobs committed while this one ran."""
    shards_before: int
    """Shards that had a commit when the run began."""
    positions_scored: int
    """Positions that the teacher scored, pilot rows included."""
    seconds: float


@dataclass(slots=True, eq=False)
class _ClaimedShard:
    """A claimed shard in work: the next row to hand out, the end of its rows, and the targets gathered so far."""

    index: int
    claim: Claim
    row: int
    stop: int
    parts: list[Targets] = field(default_factory=list)
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class _Batch:
    shard: _ClaimedShard
    rows: dict[int, Tokens]
    known: dict[int, Targets]
    """Targets of those rows that were scored with the pilot already."""
    last: bool
    """True for the batch that completes its shard."""


def require_within_limits(teacher: Teacher, targets: TargetSet) -> None:
    """Refuse before anything is written what the teacher would refuse in the middle.

    Raises:
        LimitExceeded: a row is longer than the teacher reads, or K is over its limit.
    """
    limits, longest, k = teacher.limits, targets.corpus.spec.longest_row, targets.fields.k
    if limits.max_row_tokens is not None and longest > limits.max_row_tokens:
        raise LimitExceeded(
            f"corpus {targets.corpus.name!r} has a row of {counted(longest, 'token')}, the teacher reads "
            f"{limits.max_row_tokens}; ingest it again with --row-tokens {limits.max_row_tokens}"
        )
    most = min(limits.max_top_k or teacher.identity.vocab_size, teacher.identity.vocab_size)
    if k > most:
        raise LimitExceeded(f"k={k} is over the teacher's limit of {most}; ask for at most that")


async def fill(
    teacher: Teacher,
    targets: TargetSet,
    plan: FillPlan,
    *,
    on_progress: Callable[[FillProgress], None] = lambda _: None,
) -> FillReport:
    """Score and commit every shard of `targets` that has no commit, together with other jobs that do the same.

    It ends when every shard is committed, by whichever job. When cancelled, scoring stops at once, and a shard whose
    write has begun is still committed.

    Raises:
        StoreError: the store is full or cannot be written; committed shards stay, the rest stays uncommitted.
        SpecMismatch: another job made the target set with another spec since it was planned.
        LimitExceeded, TeacherFailed, Unavailable and others: the teacher raised them.
    """
    began = time.monotonic()
    root = targets.root
    with Claims(root, targets.claims_path, ttl=plan.claim_seconds) as claims:
        queue = await with_store_retries(lambda: ShardQueue(targets, claims))
        state = _FillState(teacher, targets, plan, claims, queue, on_progress)
        if queue.num_pending:
            try:
                await state.score_pilot()
                await state.score_all()
            finally:
                await state.finish_writing()
        await with_store_retries(targets.fold)
        await asyncio.to_thread(claims.clear)
    return FillReport(
        shards_committed=state.shards_committed,
        shards_lost=state.shards_lost,
        shards_elsewhere=len(queue.elsewhere),
        shards_before=queue.shards_before,
        positions_scored=state.positions_scored,
        seconds=time.monotonic() - began,
    )


@dataclass(eq=False)
class _FillState:
    """State of one fill: batches in flight, the shard that is being gathered, the shard that is being written."""

    _teacher: Teacher
    _targets: TargetSet
    _plan: FillPlan
    _claims: Claims
    _queue: ShardQueue
    _on_progress: Callable[[FillProgress], None]
    _pilot: dict[int, Targets] = field(default_factory=dict)
    _gathering: _ClaimedShard | None = None
    _writing: asyncio.Task[None] | None = None
    _poll_at: float = 0.0
    _settled: int = 0
    positions_scored: int = 0
    shards_committed: int = 0
    shards_lost: int = 0

    def __post_init__(self) -> None:
        self._fields = self._targets.fields
        self._lengths = np.diff(self._targets.corpus.shard_starts)
        self._positions = int(self._lengths[self._queue.pending].sum())
        self._shards = self._queue.num_pending
        self._poll = min(_LONGEST_POLL, self._plan.claim_seconds / 20)

    async def score_pilot(self) -> None:
        """Score the pilot rows and make the rank table of their targets, or wait for the job that does."""
        while await with_store_retries(self._targets.pilot_rows):
            claim = await with_store_retries(self._take_pilot)
            if claim is None:
                self._report(waiting_for=self._queue.num_waiting)
                await asyncio.sleep(self._poll)
                continue
            try:
                rows = await with_store_retries(self._targets.pilot_rows)
                if rows:
                    await self._make_ranks(rows)
            finally:
                await asyncio.to_thread(claim.release)

    async def score_all(self) -> None:
        """Keep `in_flight` batches at the teacher, and take their answers in order."""
        window = ScoringWindow(self._teacher, self._fields)
        waiting: deque[_Batch] = deque()
        try:
            while True:
                while len(waiting) < self._plan.in_flight and (batch := await self._next_batch()) is not None:
                    window.start([row for index, row in batch.rows.items() if index not in batch.known])
                    waiting.append(batch)
                if waiting:
                    batch = waiting.popleft()
                    await self._take(batch, await window.oldest())
                elif self._writing is not None:
                    await self._written()
                elif self._queue.num_waiting:
                    self._report(waiting_for=self._queue.num_waiting)
                    await asyncio.sleep(max(0.0, self._poll_at - time.monotonic()))
                else:
                    return
        finally:
            await window.close()

    async def finish_writing(self) -> None:
        """Wait for the write under way, even when cancelled meanwhile; the cancellation is passed on afterwards."""
        cancelled = False
        while self._writing is not None and not self._writing.done():
            try:
                await asyncio.wait([self._writing])
            except asyncio.CancelledError:
                cancelled = True
        await self._written()
        if cancelled:
            raise asyncio.CancelledError

    async def _written(self) -> None:
        """Wait for the last write; its error is raised once."""
        writing = self._writing
        if writing is not None:
            try:
                # A cancelled fill must not cut off a write that a commit may follow; `finish_writing` waits for it.
                await asyncio.shield(writing)
            finally:
                if writing.done():
                    self._writing = None

    def _take_pilot(self) -> Claim | None:
        # `take` trusts the last look at other jobs' claims.
        self._claims.busy()
        return self._claims.take(PILOT)

    async def _make_ranks(self, rows: list[int]) -> None:
        corpus = self._targets.corpus
        window = ScoringWindow(self._teacher, self._fields)
        lengths = np.diff(await asyncio.to_thread(corpus.row_ranges, rows), axis=1)[:, 0]
        # All are held at once: `pilot_rows` chooses only about 32,768 positions.
        answers: list[Targets] = []
        try:
            for start, stop in row_batches(row_starts(lengths), self._plan.batch_tokens):
                part = rows[start:stop]
                window.start(await with_store_retries(lambda part=part: [corpus.row(row) for row in part]))  # type: ignore[misc]
                if len(window) >= self._plan.in_flight:
                    answers += self._counted(await window.oldest())
            while len(window):
                answers += self._counted(await window.oldest())
        finally:
            await window.close()
        await with_store_retries(lambda: self._targets.make_ranks(Targets.concat(answers)))
        kept = 0
        for row, answer in zip(rows, answers, strict=True):
            kept += answer.num_bytes
            if kept > _KEPT_PILOT_BYTES:
                break
            self._pilot[row] = answer

    def _counted(self, answers: list[Targets]) -> list[Targets]:
        self.positions_scored += sum(answer.num_positions for answer in answers)
        self._report()
        return answers

    async def _next_batch(self) -> _Batch | None:
        """Take the next rows to score, of the shard in work or of a newly claimed one; None when none is free now."""
        shard = self._gathering
        if shard is not None and shard.claim.lost:
            self._drop(shard)
            shard = None
        if shard is None:
            if time.monotonic() < self._poll_at:
                return None
            began = time.monotonic()
            taken = await with_store_retries(self._queue.take)
            if taken is None:
                # Looking costs requests to the store: spend at most a fifth of the time on it.
                now = time.monotonic()
                self._poll_at = now + max(self._poll, 4 * (now - began))
                return None
            index, claim = taken
            start, stop = (int(row) for row in self._targets.corpus.shard_rows[index : index + 2])
            shard = _ClaimedShard(index, claim, start, stop)
        self._gathering = shard
        batch = await with_store_retries(lambda: self._cut(shard))
        shard.row += len(batch.rows)
        self._gathering = None if batch.last else shard
        return batch

    def _cut(self, shard: _ClaimedShard) -> _Batch:
        corpus = self._targets.corpus
        _, count = next(row_batches(corpus.row_starts[shard.row : shard.stop + 1], self._plan.batch_tokens))
        end = shard.row + count
        tokens = dict(enumerate(corpus.rows(shard.row, end), start=shard.row))
        return _Batch(shard, tokens, {row: self._pilot[row] for row in tokens if row in self._pilot}, end == shard.stop)

    async def _take(self, batch: _Batch, answers: list[Targets]) -> None:
        shard = batch.shard
        self.positions_scored += sum(answer.num_positions for answer in answers)
        scored = iter(answers)
        shard.parts.extend(batch.known[row] if row in batch.known else next(scored) for row in batch.rows)
        for row in batch.known:
            self._pilot.pop(row, None)
        if shard.dropped:
            self._settled += sum(part.num_positions for part in shard.parts)
            shard.parts.clear()
        elif batch.last:
            # One shard is written at a time: otherwise a slow store would let finished shards pile up in memory.
            await self._written()
            self._writing = asyncio.create_task(self._write(shard))
        self._report()

    def _drop(self, shard: _ClaimedShard) -> None:
        """Give up a shard that another job took over while it was scored."""
        shard.dropped = True
        self._settled += sum(part.num_positions for part in shard.parts)
        shard.parts.clear()
        self._gathering = None
        self._queue.put_back(shard.index, committed=False)
        self.shards_lost += 1

    async def _write(self, shard: _ClaimedShard) -> None:
        provenance = self._teacher.provenance
        shard_targets = await asyncio.to_thread(Targets.concat, shard.parts)
        # `concat` copied them: keeping both would double the memory of a shard.
        shard.parts.clear()

        def write() -> bool:
            return self._targets.write_shard(shard.index, shard_targets, provenance, still_mine=shard.claim.still_mine)

        won = False
        try:
            won = await with_store_retries(write)
        except StoreError as error:
            raise StoreError(f"shard {shard.index} stays uncommitted: {error.detail}") from error
        finally:
            await asyncio.to_thread(shard.claim.release)
            self._queue.put_back(shard.index, committed=won)
        self.shards_committed += won
        self.shards_lost += not won
        self._settled += shard_targets.num_positions
        self._report()

    def _report(self, *, waiting_for: int = 0) -> None:
        elsewhere = self._queue.elsewhere
        positions = self._positions - int(sum(self._lengths[shard] for shard in elsewhere))
        scored = min(self.positions_scored, positions)
        shards = self._shards - len(elsewhere)
        unkept = max(0, self.positions_scored - self._settled)
        self._on_progress(FillProgress(scored, positions, self.shards_committed, shards, unkept, waiting_for))
