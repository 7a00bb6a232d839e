"""The replicas that one call has lost, and when to give it up: it has cost enough of them, or its rows kill them.

A replica *crashed* when it was well before a call and its engine or its process then ended by itself, as far as Ray and
Serve know, while it had the call. A replica that they stopped (scaled away, drained, unwell, wedged), that Ray killed
for its node's memory or that went with its node is only *lost*, which says nothing about the rows.

A kill from outside of Ray, by hand or by the kernel for a container's memory, looks like a crash, and so does, to each
call, the harm that another call on the replica did. So a call that was on a crashed replica is only suspect: it is
tried again alone, and its rows are blamed after several crashes, most of them with no other call on the replica.
"""

from __future__ import annotations

import time

from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, TaskCancelledError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError

from potstill.cache.errors import PotstillError, SpecMismatch, TeacherFailed, Unavailable
from potstill.cache.plurals import counted
from potstill.teacher_service.replicas.ray_replica import Refused, ScoreCall

LOST = (RayActorError, ObjectLostError, TaskCancelledError, GetTimeoutError, RayServeException)
"""Errors that say that a replica, and not the call, is broken. Serve's own tell of replicas that were scaled away."""
_LOSSES = 5  # a call that loses this many for whatever reason costs others too much
_CRASHES = 3  # the first may be the fault of a call that shared the replica
_CRASHES_ALONE = 2  # one of them may be a kill from outside
# A member of Ray's `WorkerExitType`, which reaches us in the message only; the others are INTENDED_*, USER_ERROR and
# NODE_OUT_OF_MEMORY.
_ENDED_BY_ITSELF = "Worker exit type: SYSTEM_ERROR"


class Losses:
    """The replicas that one call has lost."""

    def __init__(self) -> None:
        self.replicas: set[str] = set()
        """Unique ids."""
        self.last = 0.0
        """Monotonic time of the last new loss."""
        self._crashed: set[str] = set()
        self._crashed_alone: set[str] = set()

    def add(self, replica: str, how: Refused, *, alone: bool) -> bool:
        """Note a lost replica, to be asked again only where there is no other; True where it was not noted before.

        Args:
            replica: its unique id.
            how: the answer that it was lost with.
            alone: True where it had no other call meanwhile.
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
        """True where a replica crashed that had the call: the next one must have it alone."""
        return bool(self._crashed)

    @property
    def enough(self) -> bool:
        """True where the call is to be given up even if there are other replicas."""
        return len(self.replicas) >= _LOSSES or self.by_its_rows

    @property
    def by_its_rows(self) -> bool:
        """True where so many replicas crashed, enough of them without other calls, that the rows are to blame."""
        return len(self._crashed) >= _CRASHES and len(self._crashed_alone) >= _CRASHES_ALONE

    def error(self, teacher: str, call: ScoreCall, last: Refused) -> PotstillError:
        """The error for the caller: one to retry, unless the rows would then kill another replica."""
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
    """The refusal that one of the errors `LOST` comes to; `had_call` where the replica had been sent the call."""
    if isinstance(error, ReplicaUnavailableError):  # scaled away between being chosen and being sent the call
        return Refused("unavailable", f"replica {replica} left before it was sent the rows", elsewhere=True)
    detail = f"replica {replica} was lost: {first_line(error)}"
    return Refused("unavailable", detail, elsewhere=True, crashed=had_call and has_crashed(error))


def has_crashed(error: Exception) -> bool:
    """True where a replica's process ended and neither Serve nor Ray stopped it; a kill from outside is one too."""
    if not isinstance(error, ActorDiedError) or error.preempted or error.actor_init_failed:
        return False
    return _ENDED_BY_ITSELF in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error, in front of Ray's details and tracebacks."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
