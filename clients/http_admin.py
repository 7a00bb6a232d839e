"""What an admin asks of a running service: which teachers there are, and how many replicas of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import JSON
from potstill.clients.http_teacher import teacher_path
from potstill.clients.retry import Connection, RetryPolicy

_RETRY = RetryPolicy(attempts=3)  # a person waits for it


class HttpAdmin:
    """One service. Open it with `async with HttpAdmin.open(url) as admin`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, api_key: str | None = None) -> AsyncIterator[HttpAdmin]:
        """Check the URL; nothing is sent yet. The key is that of `POTSTILL_API_KEY` when none is given."""
        async with Connection.open(url, api_key=api_key, timeout=60.0, retry=_RETRY) as connection:
            yield cls(connection)

    async def teachers(self) -> list[dict[str, Any]]:
        """Every teacher: name, state and, once it is up, identity, provenance, limits and `replicas`."""
        teachers = (await self._connection.get_json("/v1/teachers")).get("teachers")
        if not isinstance(teachers, list) or not all(isinstance(teacher, dict) for teacher in teachers):
            raise TeacherFailed(f"{self._connection.url} does not list its teachers; is it a Potstill service?")
        for teacher in teachers:
            if teacher.get("state") == "ready":
                teacher["replicas"] = await self._connection.get_json(_replicas(str(teacher.get("name"))))
        return teachers

    async def add(self, name: str, wanted: Mapping[str, JSON]) -> dict[str, Any]:
        """Start a teacher; `wanted` has `model` and what else `[[teachers]]` of the settings may have.

        Raises:
            SpecMismatch: another teacher has the name. InvalidInput: its model, options or replicas cannot be.
        """
        return await self._connection.put_json(teacher_path(name), dict(wanted))

    async def remove(self, name: str) -> dict[str, Any]:
        """Have a teacher end its calls and stop; returns at once.

        One that is gone after a try whose answer was lost was removed by that try.

        Raises:
            UnknownTeacher: there is none.
        """
        removed = await self._connection.delete_json(teacher_path(name))
        return {"name": name, "state": "removed"} if removed is None else removed

    async def change_replicas(self, name: str, wanted: Mapping[str, JSON]) -> dict[str, Any]:
        """Ask for a number of `replicas`, or for `autoscale` limits (None ends it); returns the status.

        Raises:
            LimitExceeded: the service cannot have that many. InvalidInput: a number while it is autoscaled.
        """
        return await self._connection.put_json(_replicas(name), cast("JSON", dict(wanted)))


def _replicas(name: str) -> str:
    return f"{teacher_path(name)}/replicas"
