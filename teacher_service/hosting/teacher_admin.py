"""Teachers that are added and removed while the service runs."""

from __future__ import annotations

import asyncio
import logging

from potstill.cache.errors import PotstillError, SpecMismatch, Unavailable, UnknownTeacher
from potstill.teacher_service.admission.admission import Admission
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings.service import TeacherSettings

_LOG = logging.getLogger(__name__)
_EARLY_FAILURE_SECONDS = 3.0


class TeacherAdmin:
    """Changes a service's teachers. What is added is not kept over a restart: that is what settings are for.

    Args:
        teachers: the service's, by name; changed in place.
        source: makes new ones.
        admission: in front of their engines.
    """

    def __init__(self, teachers: dict[str, HostedTeacher], source: TeacherSource, admission: Admission) -> None:
        self._teachers = teachers
        self._admission = admission
        self._source = source
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._replaced: set[str] = set()

    async def add(self, settings: TeacherSettings) -> bool:
        """Start a teacher; False when the very same is there already. One that failed is started anew.

        Returns while it starts, but not before what fails at once, like a misspelt option, has done so.

        Raises:
            SpecMismatch: another teacher has the name.
            Unavailable: one of that name is being removed, or this one was before it started.
            PotstillError: what its start raises at once; then there is no teacher of that name.
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
        self._teachers[name] = teacher
        if there is not None:
            await self._close_replaced(there)
            if teacher.state == "stopped":
                raise Unavailable(f"teacher {name!r} was removed before it started")
        teacher.start(self._admission)
        await self._see_early_failure(teacher)
        return True

    def remove(self, name: str) -> None:
        """Take no more calls for a teacher, let those in flight end, and stop it; returns at once.

        Raises:
            UnknownTeacher: there is none.
        """
        if name not in self._teachers:
            raise UnknownTeacher(f"there is no teacher {name[:64]!r}; known are {', '.join(self._teachers) or 'none'}")
        if name not in self._removals:
            self._removals[name] = asyncio.create_task(self._remove(name), name=f"remove teacher {name}")

    async def close(self) -> None:
        """Give up removals that are under way: the service stops every teacher now."""
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
        """Close it before another one of its name starts: what is outside, as a Ray application, goes by that name."""
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
            pass  # it starts, as engines do: slowly
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
        # How many there are changes by itself, and by `PUT .../replicas`.
        different = [key for key in want if want[key] != have[key] and key not in ("replicas", "autoscale")]
        if different:
            raise SpecMismatch(
                f"teacher {settings.name!r} is there with another {', '.join(different)}; remove it before you add this"
            )
