"""The replicas that one call lost, and when that is enough: because no more are to be spent, or because its rows kill.

A replica counts as crashed by a call when it was well before, and its engine or its whole process then ended by itself
while it had the call. One that Serve or Ray stopped (scaled away, drained, unwell, wedged), that was killed for its
node's memory or went with its node is only lost: that says nothing of the rows. Who else was on a crashed replica is
counted too, as nobody can tell whose rows it were; hence several replicas, one after the other.
"""

from __future__ import annotations

from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, TaskCancelledError
from ray.serve.exceptions import RayServeException

from cache.errors import PotstillError, SpecMismatch, TeacherFailed, Unavailable
from teacher_service.ray_replica import Refused, ScoreCall

LOST = (RayActorError, ObjectLostError, TaskCancelledError, GetTimeoutError, RayServeException)
"""What says that a replica, and not the call, is broken. Serve's own errors tell of replicas that were scaled away."""
_LOSSES = 5
_CRASHES = 3
# Of Ray's `WorkerExitType`. It is in the message only; the others are INTENDED_*, USER_ERROR and NODE_OUT_OF_MEMORY.
_ENDED_BY_ITSELF = "Worker exit type: SYSTEM_ERROR"


class Losses:
    """Of one call, by the replicas' unique ids."""

    def __init__(self) -> None:
        self.replicas: set[str] = set()
        self._crashed: set[str] = set()

    def add(self, replica: str, how: Refused) -> None:
        """Note a replica that is not to be asked again as long as there is another."""
        self.replicas.add(replica)
        if how.crashed:
            self._crashed.add(replica)

    @property
    def enough(self) -> bool:
        """Whether the call is to be given up whoever is still there."""
        return len(self.replicas) >= _LOSSES or self.by_its_rows

    @property
    def by_its_rows(self) -> bool:
        """Whether so many replicas crashed that the rows are taken to be the cause."""
        return len(self._crashed) >= _CRASHES

    def error(self, teacher: str, call: ScoreCall, last: Refused) -> PotstillError:
        """What the caller is told: to retry, unless it would lose another replica by it."""
        cause = last.error()
        if isinstance(cause, SpecMismatch):
            return cause
        if self.by_its_rows:
            rows = f"{len(call.lengths)} rows of {len(call.tokens)} tokens"
            return TeacherFailed(
                f"{len(self._crashed)} replicas of teacher {teacher!r} crashed while they scored these {rows}, the last"
                f" by: {cause.detail}; do not retry them: send fewer at a time to find the one, or ask for less"
            )
        return Unavailable(
            f"{len(self.replicas)} replicas of teacher {teacher!r} were lost while they scored these rows, the last by:"
            f" {cause.detail}; retry when one is ready again"
        )


def lost(replica: str, error: Exception, *, had_call: bool) -> Refused:
    """What one of `LOST` comes to; `had_call` says whether the replica was well enough to be given the call."""
    detail = f"replica {replica} was lost: {first_line(error)}"
    return Refused("unavailable", detail, elsewhere=True, crashed=had_call and has_crashed(error))


def has_crashed(error: Exception) -> bool:
    """Whether a replica's process ended by itself, and nobody stopped it."""
    if not isinstance(error, ActorDiedError) or error.preempted or error.actor_init_failed:
        return False
    return _ENDED_BY_ITSELF in str(error)


def first_line(error: BaseException) -> str:
    """What Ray says before its details and tracebacks."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
