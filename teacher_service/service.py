"""What one service process holds: teachers that come and go, the cache, what is let in and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache.errors import UnknownTeacher
from teacher_service.admission import Admission
from teacher_service.metrics import Metrics
from teacher_service.replicas import HostedTeacher
from teacher_service.settings import LimitSettings

if TYPE_CHECKING:
    from cache.cache import Cache


@dataclass(frozen=True, slots=True)
class Service:
    """What the API serves. Teachers start with the app's lifespan and stop with it."""

    teachers: dict[str, HostedTeacher]
    cache: Cache | None
    admission: Admission
    metrics: Metrics

    @classmethod
    def of(
        cls,
        teachers: Iterable[HostedTeacher],
        *,
        cache: Cache | None = None,
        limits: LimitSettings | None = None,
    ) -> Service:
        """Put a service together; `cache` is what the corpus routes read."""
        by_name = {teacher.name: teacher for teacher in teachers}
        admission = Admission(limits or LimitSettings())
        return cls(by_name, cache, admission, Metrics(admission, by_name))

    @property
    def limits(self) -> LimitSettings:
        """What requests may ask for."""
        return self.admission.limits

    @property
    def ready(self) -> bool:
        """Whether every teacher is up."""
        return all(teacher.state == "ready" for teacher in self.teachers.values())

    def teacher(self, name: str) -> HostedTeacher:
        """The teacher of that name.

        Raises:
            UnknownTeacher: there is none; the message lists those that are there.
        """
        if name not in self.teachers:
            raise UnknownTeacher(f"there is no teacher {name[:64]!r}; known are {', '.join(self.teachers)}")
        return self.teachers[name]

    async def started(self) -> None:
        """Wait until every teacher is up. Raises the first failure at once, whoever is still starting."""
        await asyncio.gather(*(teacher.settled() for teacher in self.teachers.values()))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start every teacher in the background; stop them all at the end."""
        for teacher in self.teachers.values():
            teacher.start()
        try:
            yield
        finally:
            stops = await asyncio.gather(*(t.stop() for t in self.teachers.values()), return_exceptions=True)
        for failure in stops:
            if failure is not None:
                raise failure
