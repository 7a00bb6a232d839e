"""Jobs that fill corpora with the targets of hosted teachers, in the background of the service.

A job runs the cache's `fill` on a hosted teacher, behind admission like any other caller, in the turn and at the quota
of the key that asked for it. The key is looked up before each call, because it may be removed or changed while the job
runs. A job may be stopped or killed: only the shard in work is lost. At most `max_fills_running` run at one time, the
others wait in the order of asking; `fill_schedule` tells what happens while a teacher refuses a job's calls.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from potstill.cache.errors import (
    AlreadyExists,
    InvalidInput,
    LimitExceeded,
    NotFound,
    PotstillError,
    SpecMismatch,
    TeacherFailed,
)
from potstill.cache.types import JSON, Fields, Targets, Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from potstill.teacher_service.access import Caller, Quota, caller
from potstill.teacher_service.access.auth import current_caller
from potstill.teacher_service.hosting.fill_schedule import FillSchedule, FillSlot
from potstill.teacher_service.settings import LimitSettings

if TYPE_CHECKING:
    from potstill.cache.cache import Cache
    from potstill.cache.fill import FillProgress, FillReport
    from potstill.cache.targets import TargetSet

_LOG = logging.getLogger(__name__)
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
JobState = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOrder:
    """A caller's wishes for a job. An equal order for the same corpus and teacher joins the job that runs."""

    fields: Fields
    encoding: str
    batch_tokens: int = 4096
    in_flight: int = 4


@dataclass(slots=True, eq=False)
class FillJob:
    """One job, from its start to after its end."""

    corpus: str
    teacher: str
    order: FillOrder
    fitted: FillOrder
    """The order with batches that fit into the service's memory."""
    progress: FillProgress | None = None
    report: FillReport | None = None
    shards_before: int = 0
    shards: int = 0
    error: PotstillError | None = None
    refusals: int = 0
    """Number of calls that the teacher told to come back later."""
    refusal: PotstillError | None = None
    """The last such answer."""
    slot: FillSlot = field(default_factory=FillSlot)
    ended: float | None = None
    task: asyncio.Task[None] | None = None

    @property
    def state(self) -> JobState:
        """State of the job; `waiting` is one without a slot, or one that rests until it may ask its teacher again."""
        if self.ended is None:
            return "running" if self.slot.given.is_set() and not self.slot.rests else "waiting"
        if self.report is not None:
            return "done"
        return "stopped" if self.error is None else "failed"

    @property
    def seconds(self) -> float:
        """Seconds since the job got its slot, until its end; 0 before that."""
        return 0.0 if self.slot.began is None else (self.ended or time.monotonic()) - self.slot.began

    @property
    def told_to_wait(self) -> PotstillError | None:
        """The teacher's refusal, while the job rests because of it."""
        return self.refusal if self.ended is None and self.slot.rests else None

    def ended_by(self, task: asyncio.Task[None]) -> None:
        """Note the end, and a bug that ended the task: nobody awaits it."""
        self.ended = self.ended or time.monotonic()  # a task that was cancelled before its first step noted nothing
        bug = None if task.cancelled() else task.exception()
        if bug is not None:
            self.error = TeacherFailed("the job failed unexpectedly; the service's log has the cause")
            _LOG.error("fill of %s by %s failed unexpectedly", self.corpus, self.teacher, exc_info=bug)

    def to_json(self) -> dict[str, JSON]:
        """The job as the routes answer it."""
        at = self.progress
        seconds = self.seconds
        scored = self.report.positions_scored if self.report else at.positions_scored if at else 0
        return {
            "corpus": self.corpus,
            "teacher": self.teacher,
            "state": self.state,
            "fields": self.order.fields.to_json(),
            "encoding": self.order.encoding,
            "batch_tokens": self.fitted.batch_tokens,
            "in_flight": self.fitted.in_flight,
            "shards": self.shards,
            "shards_before": self.shards_before,
            "shards_committed": self.report.shards_committed if self.report else at.shards_committed if at else 0,
            "positions_scored": scored,
            "positions": at.positions if at else 0,
            "waiting_for": at.waiting_for if at else 0,
            "seconds": round(seconds, 3),
            "positions_per_second": round(scored / seconds, 1) if seconds > 0 else 0.0,
            "refusals": self.refusals,
            "told_to_wait": _told(self.told_to_wait),
            "error": _told(self.error),
            "report": None if self.report is None else asdict(self.report),
        }


class FillJobs:
    """Runs at most one job per corpus and teacher, and remembers the last of each. Used from one event loop only."""

    def __init__(self, cache: Cache | None, limits: LimitSettings) -> None:
        self._cache = cache
        self._limits = limits
        self._jobs: dict[tuple[str, str], FillJob] = {}
        self._schedule = FillSchedule(limits.max_fills_running)

    @property
    def num_begun(self) -> int:
        """Jobs that may hold targets: those that run, and those that rest until they may ask their teacher again."""
        return self._schedule.num_begun

    def jobs(self) -> list[FillJob]:
        """All remembered jobs, in the order of asking."""
        return list(self._jobs.values())

    def job(self, corpus: str, teacher: str) -> FillJob:
        """The last job of a corpus and a teacher.

        Raises:
            NotFound: there was none since the service started.
        """
        found = self._jobs.get((corpus, teacher))
        if found is None:
            raise NotFound(
                f"no fill of corpus {corpus[:64]!r} by teacher {teacher[:64]!r} was started since the service is up; "
                "`potstill fill` with these names starts one, or goes on with one from before (over HTTP: PUT)"
            )
        return found

    async def start(
        self,
        corpus: str,
        teacher: str,
        order: FillOrder,
        open_teacher: Callable[[], Teacher],
        find_caller: Callable[[], Caller] = current_caller,
    ) -> FillJob:
        """Start a job, or return the one that runs or waits already for the same order.

        Args:
            corpus: name of the corpus.
            teacher: name of the targets.
            order: what to keep, and how.
            open_teacher: finds the teacher anew before each of its calls.
            find_caller: finds the caller anew, as often; what it raises ends the job.

        Raises:
            AlreadyExists: one with another order runs or waits. UnknownCorpus: there is no such corpus.
            SpecMismatch, LimitExceeded, UnsupportedField: teacher, corpus and order do not fit; nothing was written.
            Unavailable: the teacher is not up.
        """
        cache = self._cache
        if cache is None:
            raise InvalidInput("this service has no cache to fill; start it with --cache")
        running = self._running(corpus, teacher, order)
        if running is not None:
            return running
        inner = open_teacher()
        # Opened anew: targets may have been deleted since the service opened its cache.
        targets = await asyncio.to_thread(_plan, cache.fresh(), corpus, teacher, inner, order)
        who = current_caller()
        fitted = fitted_order(order, targets, self._limits, who.quota)
        before = await asyncio.to_thread(lambda: int(targets.committed.sum()))
        # Another caller may have started it during the waits above; from here to the job's registration there is none.
        running = self._running(corpus, teacher, order)
        if running is not None:
            return running
        job = FillJob(corpus, teacher, order, fitted, shards_before=before, shards=targets.corpus.num_shards)
        job.slot.key = who.name
        self._jobs.pop((corpus, teacher), None)  # an older job's place: the order is that of asking
        self._jobs[corpus, teacher] = job
        self._schedule.request(job.slot)
        retrying = _RetryingTeacher(inner, open_teacher, find_caller, job, self._schedule)
        job.task = asyncio.create_task(_run(job, retrying, targets), name=f"fill {corpus}")
        job.task.add_done_callback(job.ended_by)
        job.task.add_done_callback(lambda _: self._schedule.end(job.slot))
        return job

    async def stop(self, corpus: str, teacher: str) -> FillJob:
        """Stop the job if it runs or waits; returns once it has ended, its last shard committed or given up.

        Raises:
            NotFound: there was no such job.
        """
        job = self.job(corpus, teacher)
        await _stopped(job)
        return job

    async def close(self) -> None:
        """Stop all jobs."""
        await asyncio.gather(*(_stopped(job) for job in self._jobs.values()))

    def _running(self, corpus: str, teacher: str, order: FillOrder) -> FillJob | None:
        found = self._jobs.get((corpus, teacher))
        if found is None or found.ended is not None:
            return None
        if found.order != order:
            raise AlreadyExists(
                f"corpus {corpus!r} is being filled by teacher {teacher!r} with {found.order.fields.to_json()}, "
                f"encoding {found.order.encoding}; stop that first: `potstill fill --corpus {corpus} "
                f"--teacher {teacher} --stop` (over HTTP: DELETE)"
            )
        return found


def _told(error: PotstillError | None) -> JSON:
    return None if error is None else {"kind": error.kind, "detail": error.detail}


def _plan(cache: Cache, corpus: str, name: str, teacher: Teacher, order: FillOrder) -> TargetSet:
    from potstill.cache.fill.loop import require_within_limits  # noqa: PLC0415  zarr, only when a job runs

    targets = cache.plan_targets(name, corpus, teacher.identity, fields=order.fields, encoding=order.encoding)
    require_within_limits(teacher, targets)
    return targets


def fitted_order(order: FillOrder, targets: TargetSet, limits: LimitSettings, quota: Quota) -> FillOrder:
    """Reduce an order so that each batch fits into `max_answer_bytes`, and all into `max_answer_bytes_in_flight`.

    A batch is `batch_tokens` long, or one longer row, and never longer than admission or a day's quota can let in.

    Raises:
        LimitExceeded: the longest row alone does not fit.
    """
    longest, per_token = targets.corpus.spec.longest_row, targets.fields.bytes_per_position(targets.identity.vocab_size)
    name, num_bytes = limits.smallest("max_answer_bytes", "max_answer_bytes_in_flight")
    # More would be told to come back later for ever, or be refused.
    bounds = [
        (limits.max_tokens_in_flight, f"max_tokens_in_flight={limits.max_tokens_in_flight}"),
        (num_bytes // per_token, f"{name}={num_bytes}, as its targets hold {longest * per_token} bytes"),
    ]
    if quota.tokens_per_day is not None:
        bounds.append((quota.tokens_per_day, f"tokens_per_day={quota.tokens_per_day} of your key"))
    most, what = min(bounds)
    if longest > most:
        raise LimitExceeded(
            f"corpus {targets.corpus.name!r} has a row of {longest} tokens, over {what}; ask for less, ingest it again "
            f"with --row-tokens {most}, or have that raised"
        )
    batch_tokens = min(order.batch_tokens, most)
    fitting = limits.max_answer_bytes_in_flight // (max(batch_tokens, longest) * per_token)
    return replace(order, batch_tokens=batch_tokens, in_flight=min(order.in_flight, fitting))


async def _run(job: FillJob, teacher: Teacher, targets: TargetSet) -> None:
    from potstill.cache.fill import FillPlan, fill  # noqa: PLC0415  zarr, only when a job runs

    def on_progress(at: FillProgress) -> None:
        job.progress = at

    plan = FillPlan(batch_tokens=job.fitted.batch_tokens, in_flight=job.fitted.in_flight)
    try:
        await job.slot.given.wait()
        # Counted again: others may have committed shards while the job waited for its slot.
        job.shards_before = int((await asyncio.to_thread(lambda: targets.committed)).sum())
        job.report = await fill(teacher, targets, plan, on_progress=on_progress)
    except PotstillError as error:
        job.error = error
        _LOG.warning("fill of %s by %s failed: %s: %s", job.corpus, job.teacher, error.kind, error.detail)
    finally:
        job.ended = time.monotonic()


async def _stopped(job: FillJob) -> None:
    if job.task is not None and not job.task.done():
        job.task.cancel()
        await asyncio.wait([job.task])  # which does not raise what the job ended by: `ended_by` has noted that


def spread(seconds: float) -> float:
    """Draw a wait of once to twice `seconds`, so that batches refused together do not come back together."""
    return seconds * random.uniform(1.0, 2.0)  # noqa: S311


@dataclass(slots=True, eq=False)
class _RetryingTeacher(WrappedTeacher):
    """A `Teacher` that retries for as long as it is told to: a job has time, and giving up would lose its shard."""

    inner: Teacher
    open_teacher: Callable[[], Teacher]
    find_caller: Callable[[], Caller]
    job: FillJob
    schedule: FillSchedule

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        pause = _PAUSE_SECONDS
        while True:
            try:
                with self.schedule.asking(self.job.slot):
                    # Found anew each time: the teacher may have been removed and added again, even as another model.
                    teacher = self.open_teacher()
                    self._require_same(teacher)
                    # Admission and quotas find the caller in the context, where a request's middleware puts it.
                    caller.set(self.find_caller())
                    return await teacher.score(rows, want)
            except PotstillError as error:
                if not error.retryable:
                    raise
                self.job.refusals += 1
                self.job.refusal = error
                wait = pause if error.retry_after is None else error.retry_after
            # Outside of `asking`: a job all of whose calls are here rests, and another one may begin.
            await self.schedule.pause(self.job.slot, spread(min(wait, _LONGEST_PAUSE_SECONDS)))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _require_same(self, teacher: Teacher) -> None:
        differences = self.identity.differences(teacher.identity)
        if differences:
            raise SpecMismatch(f"teacher {self.job.teacher!r} was exchanged: {differences}")
