"""`/v1/teachers`: list, describe, add, scale and remove teachers while the service runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from potstill.cache.errors import InvalidInput, LimitExceeded
from potstill.cache.types import JSON
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.hosting import HostedTeacher, Service
from potstill.teacher_service.replicas import ReplicaPool, ReplicaStatus
from potstill.teacher_service.settings import AutoscaleSettings, ReplicaSettings, TeacherSettings
from potstill.teacher_service.settings.service import NAME_PATTERN

_Name = Annotated[str, Path(pattern=NAME_PATTERN)]


class ReplicasWanted(BaseModel):
    """The body of `PUT /v1/teachers/{name}/replicas`: a number, or limits for autoscaling; null ends autoscaling."""

    model_config = ConfigDict(extra="forbid")
    replicas: Annotated[int, Field(ge=1, strict=True)] | None = None
    autoscale: AutoscaleSettings | None = None


class TeacherWanted(ReplicaSettings):
    """The body of `PUT /v1/teachers/{name}`: the keys of `[[teachers]]` in the settings, without the name."""

    model: Annotated[str, Field(min_length=1)]
    options: dict[str, JsonValue] = Field(default_factory=dict)


def add_admin_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""
    trainers, admins = [Depends(allow(Role.TRAINER))], [Depends(allow(Role.ADMIN))]

    @app.get("/v1/teachers", dependencies=trainers)
    async def list_teachers() -> dict[str, Any]:
        """List every teacher with its state, identity, provenance and limits."""
        return {"teachers": [_describe(teacher) for teacher in service.teachers.values()]}

    @app.get("/v1/teachers/{name}", dependencies=trainers)
    async def one_teacher(name: str) -> dict[str, Any]:
        """Describe one teacher; 503 while it starts."""
        teacher = service.teacher(name)
        _ = teacher.pool  # Unavailable while it starts, so that a client waits for the identity
        return _describe(teacher)

    @app.put("/v1/teachers/{name}", dependencies=admins)
    async def put_teacher(name: _Name, wanted: TeacherWanted, response: Response) -> dict[str, Any]:
        """Serve one more model until the service ends (role admin): 201, or 200 when it is served already."""
        given = wanted.model_dump(exclude_unset=True)
        added = await service.admin.add(TeacherSettings.model_validate({"name": name, **given}))
        response.status_code = 201 if added else 200
        return _describe(service.teacher(name))

    @app.delete("/v1/teachers/{name}", status_code=202, dependencies=admins)
    async def delete_teacher(name: str) -> dict[str, Any]:
        """Stop a teacher when its calls have ended (role admin)."""
        service.admin.remove(service.teacher(name))
        return {"name": name, "state": "draining"}

    @app.get("/v1/teachers/{name}/replicas", dependencies=trainers)
    async def get_replicas(name: str) -> dict[str, Any]:
        """Tell how many replicas there are and may be."""
        return asdict(service.teacher(name).pool.status)

    @app.put("/v1/teachers/{name}/replicas", dependencies=admins)
    async def put_replicas(name: str, wanted: ReplicasWanted) -> dict[str, Any]:
        """Ask for another number of replicas, or for autoscaling (role admin)."""
        return await _change_replicas(service.teacher(name).pool, wanted)


async def _change_replicas(pool: ReplicaPool, wanted: ReplicasWanted) -> dict[str, Any]:
    """Scale, or begin or end autoscaling. While that is on, a number alone is refused; one with a null ends it."""
    if (wanted.replicas is None) == (wanted.autoscale is None):
        raise InvalidInput("send either replicas, a number, or autoscale, its limits")
    if wanted.replicas is None:
        return asdict(await pool.autoscale(wanted.autoscale))
    if "autoscale" in wanted.model_fields_set:
        return asdict(await _scale_instead(pool, wanted.replicas))
    return asdict(await pool.scale(wanted.replicas))


async def _scale_instead(pool: ReplicaPool, replicas: int) -> ReplicaStatus:
    """Scale to a fixed number, ending autoscaling if it is on."""
    # Tried first, so that a number that the pool cannot have changes nothing.
    try:
        return await pool.scale(replicas)
    except LimitExceeded:  # of the class below, too
        raise
    except InvalidInput:  # the number is right, and the pool is autoscaled
        await pool.autoscale(None)
        return await pool.scale(replicas)


def _describe(teacher: HostedTeacher) -> dict[str, JSON]:
    description: dict[str, JSON] = {"name": teacher.name, "state": teacher.state}
    if teacher.failure:
        description["failure"] = teacher.failure
    if teacher.state == "ready":
        pool = teacher.pool
        description["identity"] = pool.identity.to_json()
        description["provenance"] = pool.provenance.to_json()
        description["limits"] = asdict(pool.limits)
    return description
