"""Administration of a running service: its teachers, and how many replicas each has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import quote

from potstill.cache.errors import NotFound, TeacherFailed
from potstill.cache.types import JSON
from potstill.clients.connection import Connection
from potstill.clients.retry import RetryPolicy

_RETRY = RetryPolicy(attempts=3)  # a person waits at the terminal


class HttpAdmin:
    """One service. Open it with `async with HttpAdmin.open(url) as admin`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, api_key: str | None = None) -> AsyncIterator[HttpAdmin]:
        """Check the URL; nothing is sent yet. Without `api_key`, that of `POTSTILL_API_KEY` is used."""
        async with Connection(url, api_key=api_key, timeout=60.0, retry=_RETRY) as connection:
            yield cls(connection)

    async def teachers(self) -> list[dict[str, Any]]:
        """Fetch every teacher: name, state and, once it is up, identity, provenance and limits."""
        teachers = (await self._connection.json("/v1/teachers")).get("teachers")
        if not isinstance(teachers, list) or not all(isinstance(teacher, dict) for teacher in teachers):
            raise TeacherFailed(f"{self._connection.url} does not list its teachers; is it a Potstill service?")
        return teachers

    async def replicas(self, name: str) -> dict[str, Any]:
        """Fetch `{"replicas", "target", "max"}` of a teacher, and `each` of its replicas."""
        return await self._connection.json(f"{teacher_path(name)}/replicas")

    async def doctor(self) -> dict[str, Any]:
        """Fetch facts that only the service itself can see: its memory, its store, the answers that it keeps.

        Raises:
            NotFound: the service is too old to say. Forbidden: the key has not the role admin.
        """
        return await self._connection.json("/v1/doctor")

    async def add(self, name: str, wanted: Mapping[str, JSON]) -> dict[str, Any]:
        """Start a teacher; `wanted` has `model` and any other key of `[[teachers]]` in the settings.

        Raises:
            SpecMismatch: another teacher has the name. InvalidInput: its model, options or replicas cannot be.
        """
        return await self._connection.json(teacher_path(name), method="PUT", body=dict(wanted))

    async def remove(self, name: str) -> dict[str, Any]:
        """Have a teacher end its calls and stop; return at once.

        Raises:
            UnknownTeacher: there is none.
        """
        tries = self._connection.tries()
        try:
            return await self._connection.json(teacher_path(name), method="DELETE", tries=tries)
        except NotFound:
            if not tries.may_be_done:
                raise
            # An earlier try removed it, and only the answer to that one was lost.
            return {"name": name, "state": "removed"}

    async def change_replicas(self, name: str, wanted: Mapping[str, JSON]) -> dict[str, Any]:
        """Ask for a number of `replicas`, or for `autoscale` limits (None ends it); returns the status.

        Raises:
            LimitExceeded: the service cannot have that many. InvalidInput: a number while it is autoscaled.
        """
        path = f"{teacher_path(name)}/replicas"
        return await self._connection.json(path, method="PUT", body=cast("JSON", dict(wanted)))


def teacher_path(name: str) -> str:
    """The route of a teacher, whatever characters its name has."""
    return f"/v1/teachers/{quote(name, safe='')}"
