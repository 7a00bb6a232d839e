"""The replicas that one call lost, and when that is enough: because no more are to be spent, or because its rows kill.

A replica counts as crashed by a call when it was well before, and its engine or its whole process then ended while it
had the call, as far as Ray and Serve know by itself. One that they stopped (scaled away, drained, unwell, wedged), that
Ray killed for its node's memory or that went with its node is only lost: that says nothing of the rows. A kill from
outside of Ray, by hand or by the kernel for the memory of a container, looks like a crash. So does, to each call, what
another call on the replica did. Hence a call that was on a crashed replica is suspect: it is tried again alone, and its
rows are only blamed for several crashes, most of which nothing else can have caused that the pool knows of.
"""

from __future__ import annotations

import time

from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, TaskCancelledError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError

from potstill.cache.errors import PotstillError, SpecMismatch, TeacherFailed, Unavailable
from potstill.cache.plurals import counted
from potstill.teacher_service.replicas.ray_replica import Refused, ScoreCall

LOST = (RayActorError, ObjectLostError, TaskCancelledError, GetTimeoutError, RayServeException)
"""What says that a replica, and not the call, is broken. Serve's own errors tell of replicas that were scaled away."""
_LOSSES = 5
_CRASHES = 3
_CRASHES_ALONE = 2
# Of Ray's `WorkerExitType`. It is in the message only; the others are INTENDED_*, USER_ERROR and NODE_OUT_OF_MEMORY.
_ENDED_BY_ITSELF = "Worker exit type: SYSTEM_ERROR"


class Losses:
    """Of one call, by the replicas' unique ids."""

    def __init__(self) -> None:
        self.replicas: set[str] = set()
        self.last = 0.0
        """The monotonic time of the last new loss."""
        self._crashed: set[str] = set()
        self._crashed_alone: set[str] = set()

    def add(self, replica: str, how: Refused, *, alone: bool) -> bool:
        """Note a replica that is not to be asked again as long as there is another; returns whether it is a new one.

        Args:
            replica: its unique id.
            how: it was lost.
            alone: it had no other call meanwhile.
        """
        new = replica not in self.replicas
        self.replicas.add(replica)
        if new:
            self.last = time.monotonic()
        if how.crashed:
            self._crashed.add(replica)
            if alone:
                self._crashed_alone.add(replica)
        return new

    @property
    def suspect(self) -> bool:
        """Whether a replica crashed that had the call: the next one must have it alone."""
        return bool(self._crashed)

    @property
    def enough(self) -> bool:
        """Whether the call is to be given up whoever is still there."""
        return len(self.replicas) >= _LOSSES or self.by_its_rows

    @property
    def by_its_rows(self) -> bool:
        """Whether so many replicas crashed, enough of them without other calls, that the rows are the likely cause."""
        return len(self._crashed) >= _CRASHES and len(self._crashed_alone) >= _CRASHES_ALONE

    def error(self, teacher: str, call: ScoreCall, last: Refused) -> PotstillError:
        """What the caller is told: to retry, unless it would lose another replica by it."""
        cause = last.error()
        if isinstance(cause, SpecMismatch):
            return cause
        if self.by_its_rows:
            rows = f"{counted(len(call.lengths), 'row')} of {counted(len(call.tokens), 'token')}"
            return TeacherFailed(
                f"{len(self._crashed)} replicas of teacher {teacher!r} crashed while they scored {rows},"
                f" {len(self._crashed_alone)} of them with no other call, the last by: {cause.detail};"
                " do not retry them: send fewer at a time to find the one, or ask for less"
            )
        return Unavailable(
            f"{len(self.replicas)} replicas of teacher {teacher!r} were lost while they scored these rows, the last by:"
            f" {cause.detail}; retry when one is ready again"
        )


def lost(replica: str, error: Exception, *, had_call: bool) -> Refused:
    """What one of `LOST` comes to; `had_call` says whether the replica was well enough to be given the call."""
    if isinstance(error, ReplicaUnavailableError):  # scaled away between being chosen and being sent the call
        return Refused("unavailable", f"replica {replica} left before it was sent the rows", elsewhere=True)
    detail = f"replica {replica} was lost: {first_line(error)}"
    return Refused("unavailable", detail, elsewhere=True, crashed=had_call and has_crashed(error))


def has_crashed(error: Exception) -> bool:
    """Whether a replica's process ended and neither Serve nor Ray stopped it; a kill from outside is no exception."""
    if not isinstance(error, ActorDiedError) or error.preempted or error.actor_init_failed:
        return False
    return _ENDED_BY_ITSELF in str(error)


def first_line(error: BaseException) -> str:
    """What Ray says before its details and tracebacks."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
