"""Teachers that are added and removed while the service runs."""

from __future__ import annotations

import asyncio
import logging

from potstill.cache.errors import PotstillError, SpecMismatch, Unavailable
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings import TeacherSettings

_LOG = logging.getLogger(__name__)
# Misspelt options fail within this time and are answered; the tens of seconds of an engine's start are not waited for.
_EARLY_FAILURE_SECONDS = 3.0


class TeacherAdmin:
    """Adds and removes a service's teachers. A restart forgets them: teachers that are to stay belong in the settings.

    Args:
        teachers: the service's teachers by name, changed in place.
        source: makes new teachers.
        admission: stands in front of their engines.
    """

    def __init__(self, teachers: dict[str, HostedTeacher], source: TeacherSource, admission: Admission) -> None:
        self._teachers = teachers
        self._admission = admission
        self._source = source
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._replaced: set[str] = set()

    async def add(self, settings: TeacherSettings) -> bool:
        """Start a teacher; False where an equal one is there already. One that has failed is started anew.

        Waits some seconds for failures that come at once, like a misspelt option, and then returns while it starts.

        Raises:
            SpecMismatch: another teacher has the name.
            Unavailable: a teacher of that name is being removed, or this one was removed before it started.
            PotstillError: its start failed at once; then there is no teacher of that name.
        """
        name = settings.name
        there = self._teachers.get(name)
        if name in self._removals or (there is None and name in self._replaced):
            raise Unavailable(f"teacher {name!r} is being removed; add it when it is gone")
        if there is not None and there.state != "failed":
            self._require_same(there, settings)
            return False
        teacher = self._source.host(settings)
        teacher.awaited = False
        # In place before the await below: a second caller then finds this one, and does not start another.
        self._teachers[name] = teacher
        if there is not None:
            await self._close_replaced(there)
            if teacher.state == "stopped":
                raise Unavailable(f"teacher {name!r} was removed before it started")
        teacher.start(self._admission)
        await self._see_early_failure(teacher)
        return True

    def remove(self, teacher: HostedTeacher) -> None:
        """Begin to remove a teacher: it takes no more calls, ends those in flight, and stops. Returns at once."""
        name = teacher.name
        if name not in self._removals:
            self._removals[name] = asyncio.create_task(self._remove(name), name=f"remove teacher {name}")

    async def close(self) -> None:
        """Give up removals that are under way, because the service stops every teacher now."""
        for task in self._removals.values():
            task.cancel()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)

    async def _remove(self, name: str) -> None:
        teacher = self._teachers[name]
        try:
            await teacher.drain()
            await self._close(teacher)
            del self._teachers[name]
        finally:
            del self._removals[name]

    async def _close_replaced(self, teacher: HostedTeacher) -> None:
        """Close a failed teacher before its successor starts: a Ray application goes by the teacher's name."""
        self._replaced.add(teacher.name)
        try:
            await self._close(teacher)
        finally:
            self._replaced.discard(teacher.name)

    async def _see_early_failure(self, teacher: HostedTeacher) -> None:
        try:
            async with asyncio.timeout(_EARLY_FAILURE_SECONDS):
                await teacher.settled()
        except TimeoutError:
            pass  # it starts, slowly as engines do
        except PotstillError:
            if self._teachers.get(teacher.name) is teacher:
                del self._teachers[teacher.name]
            raise

    @staticmethod
    async def _close(teacher: HostedTeacher) -> None:
        try:
            await teacher.stop()
        except Exception:  # noqa: BLE001 -- it is gone for its callers, whatever its closing says
            _LOG.exception("teacher %r did not close cleanly", teacher.name)

    @staticmethod
    def _require_same(there: HostedTeacher, settings: TeacherSettings) -> None:
        if there.settings is None:
            raise SpecMismatch(f"teacher {settings.name!r} is there; remove it before you add another")
        have, want = there.settings.model_dump(), settings.model_dump()
        # The number of replicas changes by itself, and by `PUT .../replicas`.
        different = [key for key in want if want[key] != have[key] and key not in ("replicas", "autoscale")]
        if different:
            raise SpecMismatch(
                f"teacher {settings.name!r} is there with another {', '.join(different)}; remove it before you add this"
            )
