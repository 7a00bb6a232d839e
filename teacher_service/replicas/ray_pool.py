"""A teacher's replicas on Ray Serve, scaled while they work.

A call goes to the replica with the fewest tokens in flight. If that replica is lost, another one scores the call, or
where there is none the one that Serve starts in its place, so callers do not see killed, wedged or drained replicas. If
it crashed, the call is tried again with a replica to itself: rows that kill engines are found out, and calls that only
shared a replica with them are answered.

Run on CPUs; replicas with GPUs, and tensor-parallel ones, were not run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from potstill.cache.errors import InvalidInput, LimitExceeded, TeacherFailed, Unavailable
from potstill.cache.types import Fields, Provenance, Targets, TeacherIdentity, TeacherLimits, Tokens
from potstill.teacher_service.replicas.autoscale import Autoscaler
from potstill.teacher_service.replicas.pool import OpenTeacher, PoolState, ReplicaInfo, ReplicaStatus
from potstill.teacher_service.replicas.ray_in_flight import CallsInFlight
from potstill.teacher_service.replicas.ray_losses import LOST, Losses, first_line, lost
from potstill.teacher_service.replicas.ray_replica import Described, Refused, ScoreCall
from potstill.teacher_service.replicas.ray_serve import (
    RayConnection,
    ServeApp,
    ServeView,
    take_signals_back,
)
from potstill.teacher_service.settings import AutoscaleSettings, RaySettings, ReplicaSettings

_LOG = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_PAUSE_SECONDS = 0.1
# A replica that lost a call may be whole, and is asked again where there is no other.
_ASK_AGAIN_SECONDS = 5.0
_FAILED = ("DEPLOY_FAILED", "DELETING", "NOT_STARTED")


class RayPool:
    """A `potstill.cache.types.Teacher` made of Ray Serve replicas. Open with `open`."""

    identity: TeacherIdentity
    """Identity of every replica; one with another identity refuses to score, and is replaced."""
    provenance: Provenance
    """Provenance of the first replica's numbers."""
    limits: TeacherLimits

    def __init__(self, name: str, app: ServeApp, settings: ReplicaSettings, ray: RaySettings | None = None) -> None:
        ray = ray or RaySettings()
        self._name = name
        self._app = app
        self._settings = settings
        self._score: Any = None
        self._view = ServeView("NOT_STARTED", "", {})
        self._target = settings.autoscale.min if settings.autoscale else settings.replicas
        self._autoscaler = Autoscaler(settings.autoscale) if settings.autoscale else None
        self._in_flight = CallsInFlight()
        # Suspect calls have a replica to themselves, one call at a time; other calls go elsewhere meanwhile.
        self._suspects = asyncio.Lock()
        self._reserved = ""
        self._last_alone = 0.0
        self._queued: Callable[[], int] = lambda: 0
        # One change of the number at a time, or the slower of two would have the last word.
        self._scaling = asyncio.Lock()
        # Serve's time to find out that a replica is broken. `_deploy` adds two starts, as the next may be slower.
        self._patience_seconds = 3 * ray.health_seconds + ray.health_timeout_seconds
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        open_teacher: OpenTeacher,
        *,
        name: str,
        connection: RayConnection,
        settings: ReplicaSettings | None = None,
        gpus_per_engine: int = 1,
    ) -> AsyncIterator[RayPool]:
        """Deploy the teacher and wait for its first replica; drain and stop the replicas at the end of the block.

        Args:
            open_teacher: opens one engine in a replica's process, to which it is sent pickled.
            name: the teacher's name.
            connection: the connection to Ray, shared by all teachers.
            settings: number of replicas, and the resources of each.
            gpus_per_engine: where the settings say nothing and the cluster has GPUs.

        Raises:
            Unavailable: Ray is not there.
            PotstillError: what opening the teacher raises in a replica.
        """
        settings = settings or ReplicaSettings()
        app = ServeApp(f"{connection.settings.app_prefix}-{name}", connection.settings)
        await asyncio.to_thread(connection.join)
        take_signals_back()  # here and not in `join`, which is in a thread
        try:
            await asyncio.to_thread(connection.start_serve)
            pool = cls(name, app, settings, connection.settings)
            try:
                await pool._deploy(open_teacher, gpus_per_engine)
                keeper = asyncio.create_task(pool._look_forever(), name=f"replicas of {name}")
                try:
                    yield pool
                finally:
                    pool._closed = True
                    keeper.cancel()
                    await asyncio.wait({keeper})
            finally:
                await asyncio.to_thread(app.delete)
        finally:
            await asyncio.to_thread(connection.leave)

    @property
    def state(self) -> PoolState:
        """State by Serve's last answer, about a second old at most."""
        if "ready" in self._view.replicas.values():
            return "ready"
        return "failed" if self._view.status in _FAILED else "starting"

    @property
    def failure(self) -> str:
        """Reason for which no replica is ready, by Serve's last answer; empty when one is."""
        return "" if self.state == "ready" else self._view.cause.detail

    @property
    def status(self) -> ReplicaStatus:
        """Status by Serve's last answer, about a second old at most."""
        calls = self._in_flight
        each = tuple(
            ReplicaInfo(name=name, state=state, tokens_waiting=calls.waiting[name], tokens_scored=calls.scored[name])
            for name, state in sorted(self._view.replicas.items())
        )
        limits = self._autoscaler.settings if self._autoscaler else None
        return ReplicaStatus(
            replicas=sum(info.state == "ready" for info in each),
            target=self._target,
            min=limits.min if limits else 1,
            max=limits.max if limits else self._settings.max_replicas,
            each=each,
        )

    async def scale(self, num_replicas: int) -> ReplicaStatus:
        """Ask for another number of replicas; those that stay are left alone, those that go finish their work.

        Raises:
            LimitExceeded: over `max_replicas`. InvalidInput: the teacher is autoscaled.
            Unavailable: Ray Serve does not answer.
        """
        if not 1 <= num_replicas <= self._settings.max_replicas:
            raise LimitExceeded(
                f"{num_replicas} replicas were asked for, but teacher {self._name!r} has 1 to"
                f" max_replicas={self._settings.max_replicas}"
            )
        async with self._scaling:
            if self._autoscaler is not None:
                limits = self._autoscaler.settings
                raise InvalidInput(
                    f"teacher {self._name!r} is autoscaled between {limits.min} and {limits.max} replicas; set other"
                    ' limits with {"autoscale": {...}}, or end it with {"autoscale": null, "replicas": N}'
                )
            try:
                await self._scale(num_replicas)
            except (RayError, RayServeException) as error:
                cause = first_line(error)
                raise Unavailable(f"Ray Serve does not scale {self._name!r} now: {cause}; try again") from error
        return self.status

    async def autoscale(self, limits: AutoscaleSettings | None) -> ReplicaStatus:
        """Let the number follow the waiting tokens within `limits`; None ends that and leaves the number as it is.

        Raises:
            LimitExceeded: over `max_replicas`.
        """
        if limits is not None and limits.max > self._settings.max_replicas:
            most = self._settings.max_replicas
            raise LimitExceeded(f"autoscale.max={limits.max} is over max_replicas={most} of teacher {self._name!r}")
        async with self._scaling:
            self._autoscaler = None if limits is None else Autoscaler(limits)
        return self.status

    def follow_queue(self, tokens_queued: Callable[[], int]) -> None:
        """Have autoscaling count the tokens that wait in front of this pool too."""
        self._queued = tokens_queued

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        """Score on the replicas; see `potstill.cache.types.Teacher`.

        Raises:
            TeacherFailed: the engine fails at these rows, or several replicas crashed with them.
            SpecMismatch: the replicas are not the same teacher.
            Unavailable: the replicas were lost, and no other came in the time that Serve needs to replace one.
        """
        if not rows:
            return []
        call = ScoreCall.of(rows, want, self.identity)
        losses = Losses()
        outcome = await self._try_once(call, losses, await self._unreserved(losses.replicas))
        while isinstance(outcome, Refused):
            if not outcome.elsewhere:
                raise outcome.error()  # of a sound replica: another one would say the same
            again = None if losses.enough else await self._try_again(call, losses)
            if again is None:
                if self._closed:
                    raise Unavailable(f"teacher {self._name!r} is closed")
                raise losses.error(self._name, call, outcome)
            outcome = again
        return _rows_of(outcome, call)

    async def _try_again(self, call: ScoreCall, losses: Losses) -> Targets | Refused | None:
        """Another replica's answer; None where none was ready in the time that Serve needs to replace one."""
        if losses.suspect:
            async with self._suspects:
                return await self._try_alone(call, losses)
        if not await self._another(losses.replicas, losses.last + self._patience_seconds):
            return None
        return await self._try_once(call, losses, await self._unreserved(losses.replicas))

    async def _try_alone(self, call: ScoreCall, losses: Losses) -> Targets | Refused | None:
        """The answer of a replica that has no other call, as far as Serve's router follows our ranking."""
        # Counted from the last suspect's end: a call that queued behind others has not used up its own patience.
        while await self._another(losses.replicas, max(losses.last, self._last_alone) + self._patience_seconds):
            self._reserved = replica = self._ranking(losses.replicas)[0]
            try:
                if await self._drained(replica):
                    return await self._try_once(call, losses, [replica])
            finally:
                self._reserved = ""
                self._last_alone = time.monotonic()
        return None

    async def _drained(self, replica: str) -> bool:
        """Wait until the replica has no call; False if it is lost before."""
        while self._is_ready(replica):
            if not self._in_flight.calls(replica):
                return True
            await asyncio.sleep(_PAUSE_SECONDS)
        return False

    async def _unreserved(self, avoid: set[str]) -> list[str]:
        """The ranking without the reserved replica; waits while that is the only one not to be avoided."""
        while True:
            ranking = self._ranking(avoid)
            others = [name for name in ranking if name != self._reserved]
            if others == ranking or set(others) - avoid:
                return others
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _another(self, avoid: set[str], until: float) -> bool:
        """Wait for a replica: one not to be avoided, or after some seconds any; False where none is ready in time."""
        again = time.monotonic() + _ASK_AGAIN_SECONDS
        while not self._closed:
            ready = set(self._ranking(avoid))
            if ready - avoid or (ready and time.monotonic() >= again):
                return True
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(_PAUSE_SECONDS)
        return False

    async def _try_once(self, call: ScoreCall, losses: Losses, ranking: list[str]) -> Targets | Refused:
        """The answer of the best-ranked replica, which is added to `losses` where it is lost or broken."""
        replica = ranking[0] if ranking else ""
        # Counted before Serve's choice, which takes a round trip: the ranking of calls that come meanwhile must see it.
        in_flight = self._in_flight.begin(replica, len(call.tokens))
        sent = False
        try:
            async with self._score.choose_replica(ranking) as chosen:
                replica = in_flight.move(chosen.replica_id)
                response = self._score.dispatch(chosen, call)
                sent = True
                try:
                    outcome: Targets | Refused = await response
                except asyncio.CancelledError:
                    response.cancel()  # or the replica would go on scoring for nobody
                    raise
        except LOST as error:
            outcome = lost(replica, error, had_call=sent)
        finally:
            in_flight.end()
        if isinstance(outcome, Targets):
            self._in_flight.scored[replica] += len(call.tokens)
        elif outcome.elsewhere:
            self._lose(replica, outcome, losses, alone=in_flight.alone)
        return outcome

    def _lose(self, replica: str, outcome: Refused, losses: Losses, *, alone: bool) -> None:
        if outcome.crashed:
            self._in_flight.crashed.add(replica)
        if losses.add(replica, outcome, alone=alone):
            _LOG.warning("teacher %s: %s; its rows go to another replica", self._name, outcome.detail)

    def _ranking(self, avoid: set[str]) -> list[str]:
        """Unique ids of the ready replicas, the fewest waiting tokens first; those to avoid come last."""
        ready = filter(self._is_ready, self._view.replicas)
        return sorted(ready, key=lambda name: (name in avoid, self._in_flight.waiting[name]))

    def _is_ready(self, replica: str) -> bool:
        return self._view.replicas.get(replica) == "ready" and replica not in self._in_flight.crashed

    async def _deploy(self, open_teacher: OpenTeacher, gpus_per_engine: int) -> None:
        resources = self._settings.resources
        gpus = resources.gpus
        if gpus is None:
            cluster = await asyncio.to_thread(ray.cluster_resources)
            gpus = float(gpus_per_engine) if cluster.get("GPU") else 0.0
        # A service that was killed may have left an application of this name with another teacher.
        await asyncio.to_thread(self._app.delete)
        handle = await asyncio.to_thread(
            self._app.deploy, open_teacher, replicas=self._target, resources=resources, gpus=gpus
        )
        self._score = handle.score
        begin = time.monotonic()
        while self.state != "ready":
            self._view = await asyncio.to_thread(self._app.look)
            if self._view.status == "DEPLOY_FAILED":
                raise self._view.cause
            await asyncio.sleep(_LOOK_SECONDS / 4)
        self._patience_seconds += 2 * (time.monotonic() - begin)
        try:
            known: Described = await handle.describe.remote()
        except (RayError, RayServeException) as error:
            cause = first_line(error)
            raise Unavailable(f"the first replica of {self._name!r} was lost at once: {cause}") from error
        self.identity, self.provenance, self.limits = known.identity, known.provenance, known.limits

    async def _look_forever(self) -> None:
        silent = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                self._view = await asyncio.to_thread(self._app.look)
                await self._follow_need()
                silent = False
            except (RayError, RayServeException, OSError) as error:
                # Calls go on without Serve's controller, which Ray restarts. One warning an outage, not one a second.
                if not silent:
                    _LOG.warning("teacher %s: Ray Serve does not answer: %s", self._name, first_line(error))
                silent = True
            self._in_flight.forget(set(self._view.replicas))

    async def _follow_need(self) -> None:
        async with self._scaling:
            if self._autoscaler is None:
                return
            waiting = self._in_flight.waiting.total() + self._queued()
            wanted = self._autoscaler.wanted(now=time.monotonic(), tokens_waiting=waiting, replicas=self._target)
            if wanted != self._target:
                _LOG.warning("teacher %s: %d tokens wait, %d -> %d replicas", self._name, waiting, self._target, wanted)
                await self._scale(wanted)

    async def _scale(self, num_replicas: int) -> None:
        await asyncio.to_thread(self._app.scale, num_replicas)
        self._target = num_replicas
        self._view = await asyncio.to_thread(self._app.look)


def _rows_of(targets: Targets, call: ScoreCall) -> list[Targets]:
    """Cut the targets of a call into views, one per row.

    Raises:
        TeacherFailed: the replica answered another number of positions.
    """
    if targets.num_positions != len(call.tokens):
        raise TeacherFailed(f"a replica answered {targets.num_positions} positions for {len(call.tokens)} tokens")
    stops = call.lengths.cumsum().tolist()
    return [targets[stop - length : stop] for stop, length in zip(stops, call.lengths.tolist(), strict=True)]
