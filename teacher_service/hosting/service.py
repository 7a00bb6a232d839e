"""The state of one service process: teachers, cache, admission, access, fill jobs and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from potstill.cache.errors import PotstillError, UnknownTeacher
from potstill.cache.types import TeacherIdentity
from potstill.teacher_service.access import Access
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.hosting.fill_jobs import FillJobs
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.metrics import Metrics, pool_of
from potstill.teacher_service.hosting.teacher_admin import TeacherAdmin
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings import LimitSettings

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

_LOG = logging.getLogger(__name__)


class Service:
    """Everything that the routes use. Teachers start and stop with `running`.

    Args:
        teachers: started with the service.
        cache: read by the corpus routes.
        limits: bounds of requests.
        source: makes teachers that are added later.
        access: keys and roles; when not given everybody may do everything.
    """

    def __init__(
        self,
        teachers: Iterable[HostedTeacher],
        *,
        cache: Cache | None = None,
        limits: LimitSettings | None = None,
        source: TeacherSource | None = None,
        access: Access | None = None,
    ) -> None:
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.cache = cache
        self.admission = Admission(limits or LimitSettings())
        self.access = access or Access()
        self.metrics = Metrics(self.admission, self.teachers, self.access)
        self.admin = TeacherAdmin(self.teachers, source or TeacherSource(), self.admission)
        self.fills = FillJobs(cache, self.limits)

    @property
    def limits(self) -> LimitSettings:
        """Bounds of requests."""
        return self.admission.limits

    @property
    def ready(self) -> bool:
        """True where every teacher is up that the service was started with, or that was up since.

        A service without teachers is ready where it has a cache, whose committed targets it serves all the same. One
        that cannot read its keys answers nobody.
        """
        if self.access.failed:
            return False
        if not self.teachers:
            return self.cache is not None
        return all(teacher.in_order for teacher in self.teachers.values())

    def teacher(self, name: str) -> HostedTeacher:
        """The teacher of that name.

        Raises:
            UnknownTeacher: there is none; the message lists those that are there.
        """
        if name not in self.teachers:
            raise UnknownTeacher(f"there is no teacher {name[:64]!r}; known are {', '.join(self.teachers) or 'none'}")
        return self.teachers[name]

    def identity_of(self, name: str) -> TeacherIdentity | None:
        """Identity of a teacher that is up; None where there is none of this name, or not yet."""
        teacher = self.teachers.get(name)
        pool = None if teacher is None else pool_of(teacher)
        return None if pool is None else pool.identity

    async def started(self) -> None:
        """Wait until every teacher is up or has failed, which is logged; the others go on without it.

        Raises:
            PotstillError: the failure of the first, where none is up.
        """
        failures = await asyncio.gather(*(self._told(teacher) for teacher in self.teachers.values()))
        failed = [failure for failure in failures if failure is not None]
        if failed and len(failed) == len(failures):
            raise failed[0]

    async def _told(self, teacher: HostedTeacher) -> PotstillError | None:
        """The failure of a teacher that did not start, told at once as the others may take long; else None."""
        try:
            await teacher.settled()
        except PotstillError as error:
            if len(self.teachers) > 1:  # the failure of the only one is what the service ends with
                _LOG.error("%s: %s", error.kind, error.detail)
            return error
        return None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start every teacher in the background; stop them all at the end."""
        for teacher in self.teachers.values():
            teacher.start(self.admission)
        try:
            yield
        finally:
            # Fills first, as they call teachers; then removals, which wait for calls that the stop ends anyway.
            await self.fills.close()
            await self.admin.close()
            # Every teacher is stopped, whichever fails: an engine that is left running holds its GPU.
            stops = await asyncio.gather(*(t.stop() for t in self.teachers.values()), return_exceptions=True)
        for failure in stops:
            if failure is not None:
                raise failure
