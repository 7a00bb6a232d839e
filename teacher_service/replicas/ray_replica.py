"""The code inside a Ray Serve replica: one engine, and the messages between it and the service's pool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from potstill.cache.errors import PotstillError, error_class
from potstill.cache.types import Fields, Provenance, Targets, Teacher, TeacherIdentity, TeacherLimits, Tokens
from potstill.teacher_service.replicas.health import EngineHealth
from potstill.teacher_service.replicas.pool import OpenTeacher


@dataclass(frozen=True, slots=True)
class Described:
    """A replica's description of its teacher."""

    identity: TeacherIdentity
    provenance: Provenance
    limits: TeacherLimits


@dataclass(frozen=True, slots=True, eq=False)
class ScoreCall:
    """Rows for one replica, as two arrays: they cross processes without a copy."""

    tokens: NDArray[np.uint32]
    """[P] tokens of all rows, one row after the other."""
    lengths: NDArray[np.int64]
    """[B] tokens of each row."""
    want: Fields
    identity: TeacherIdentity
    """Identity of the pool's teacher; a replica with another one refuses."""

    @classmethod
    def of(cls, rows: Sequence[Tokens], want: Fields, identity: TeacherIdentity) -> ScoreCall:
        """Pack the rows; at least one."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows), lengths, want, identity)

    @property
    def rows(self) -> list[Tokens]:
        """Views of `tokens`, one per row."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True, slots=True)
class Refused:
    """An error of ours, sent as data: Ray would wrap an exception in another class and log its traceback."""

    kind: str
    detail: str
    elsewhere: bool
    """True where this replica is broken and not the call, so that another one may answer."""
    crashed: bool = False
    """True where the replica was well before the call, and ended by itself while it had it."""

    def error(self) -> PotstillError:
        """The error to raise in the service."""
        return error_class(self.kind)(self.detail)


class Replica:
    """One engine, opened when the replica starts and closed when Serve has drained it.

    A broken engine is not mended here: the replica says that it is unwell, and Serve replaces the whole replica.
    """

    async def __init__(self, open_teacher: OpenTeacher, wedged_seconds: float) -> None:  # type: ignore[misc]
        # Serve awaits this constructor, so the engine is opened on the event loop that will use it.
        self._stack = AsyncExitStack()
        self._teacher: Teacher = await self._stack.enter_async_context(open_teacher())
        self._health = EngineHealth(self._teacher, wedged_seconds=wedged_seconds)
        self._foreign = ""
        self._broken = ""
        self._closing: asyncio.Task[None] | None = None

    def describe(self) -> Described:
        """Tell the pool which teacher this is."""
        return Described(self._teacher.identity, self._teacher.provenance, self._teacher.limits)

    async def score(self, call: ScoreCall) -> Targets | Refused:
        """Score all rows of one call, flat on the position axis; errors of ours come back as `Refused`."""
        # Kept for Serve's next question after the health, whose answer has this replica replaced.
        self._foreign = call.identity.differences(self._teacher.identity)
        if self._foreign:
            return Refused("spec_mismatch", f"a replica is another teacher: {self._foreign}", elsewhere=True)
        well = not self._trouble
        try:
            with self._health.call(len(call.tokens)):
                return Targets.concat(await self._teacher.score(call.rows, call.want))
        except PotstillError as error:
            elsewhere = bool(self._trouble)
            return Refused(error.kind, error.detail, elsewhere=elsewhere, crashed=well and self._health.ended)

    @property
    def _trouble(self) -> str:
        return self._broken or self._health.trouble()

    async def check_health(self) -> None:
        """Tell Serve, which asks every few seconds, that the replica is well.

        Raises:
            RuntimeError: the engine has ended or is wedged, or it is not the teacher that was asked for.
        """
        self._broken = self._trouble or self._foreign
        if self._broken:
            # Closed already now: Serve may kill this process, which the engine's own processes would outlive.
            self._closing = self._closing or asyncio.create_task(self._stack.aclose())
            raise RuntimeError(self._broken)

    async def __del__(self) -> None:
        # Serve awaits this after the drain, and also where the constructor failed and there is nothing to close.
        if hasattr(self, "_health") and self._closing is None:
            await self._stack.aclose()


class FewestTokensRouter(RequestRouter):  # type: ignore[misc]
    """Chooses replicas as the service ranks them: Serve knows the calls of each replica, and only the pool its tokens.

    The ranking is the first argument of each call of `choose_replica`: unique ids, the best first.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Put each replica in a rank of its own: one is taken only where those before are at their limit of calls."""
        ranking: list[str] = pending_request.args[0] if pending_request and pending_request.args else []
        places = {name: place for place, name in enumerate(ranking)}
        # A replica that the service has not heard of yet comes last.
        ranked = sorted(candidate_replicas, key=lambda one: places.get(one.replica_id.unique_id, len(places)))
        return [[replica] for replica in ranked]
