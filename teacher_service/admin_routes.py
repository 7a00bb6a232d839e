"""`/v1/teachers`: which there are, and how many replicas of each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from cache.types import JSON
from teacher_service.replicas import HostedTeacher
from teacher_service.service import Service


class ReplicasWanted(BaseModel):
    """The body of `PUT /v1/teachers/{name}/replicas`."""

    model_config = ConfigDict(extra="forbid")
    replicas: Annotated[int, Field(ge=1, strict=True)]


def add_admin_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""

    @app.get("/v1/teachers")
    async def list_teachers() -> dict[str, Any]:
        return {"teachers": [_describe(teacher) for teacher in service.teachers.values()]}

    @app.get("/v1/teachers/{name}")
    async def one_teacher(name: str) -> dict[str, Any]:
        teacher = service.teacher(name)
        _ = teacher.pool  # Unavailable while it starts, so that a client waits for the identity
        return _describe(teacher)

    @app.get("/v1/teachers/{name}/replicas")
    async def get_replicas(name: str) -> dict[str, int]:
        return asdict(service.teacher(name).pool.status)

    @app.put("/v1/teachers/{name}/replicas")
    async def put_replicas(name: str, wanted: ReplicasWanted) -> dict[str, int]:
        return asdict(await service.teacher(name).pool.scale(wanted.replicas))


def _describe(teacher: HostedTeacher) -> dict[str, JSON]:
    description: dict[str, JSON] = {"name": teacher.name, "state": teacher.state}
    if teacher.state == "ready":
        pool = teacher.pool
        description["identity"] = pool.identity.to_json()
        description["provenance"] = pool.provenance.to_json()
        description["limits"] = asdict(pool.limits)
    return description
