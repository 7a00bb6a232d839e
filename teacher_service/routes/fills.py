"""`/v1/corpora/{corpus}/fill/{teacher}`: start, watch and stop a job that fills a corpus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.datastructures import Headers

from potstill.cache.errors import Forbidden, Unauthenticated
from potstill.cache.types import JSON, Fields, Teacher
from potstill.cache.wire import scores as wire
from potstill.teacher_service.access import Access, Caller, Role, allow
from potstill.teacher_service.access.auth import current_caller
from potstill.teacher_service.admission.limits import same_wire
from potstill.teacher_service.hosting import FillOrder, Service
from potstill.teacher_service.hosting.fill_jobs import FillJob

_PATH = "/v1/corpora/{corpus}/fill/{teacher}"


class FillWanted(BaseModel):
    """The body of PUT."""

    model_config = ConfigDict(extra="forbid")
    format: str | None = None
    """The client's wire version; the header `potstill-format` may name it instead."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields to keep, as in a request to score."""
    encoding: Literal["u8", "archive", "f16", "f32"] = "u8"
    batch_tokens: Annotated[int, Field(ge=1, strict=True)] = 4096
    in_flight: Annotated[int, Field(ge=1, le=64, strict=True)] = 4

    @field_validator("format", mode="after")
    @classmethod
    def _of_this_version(cls, version: str | None) -> str | None:
        # Checked as the first field: a client of another version is told so, and not that its other keys are wrong.
        if version is not None:
            wire.require_version(version)
        return version


def add_fill_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""
    watching = [Depends(allow(Role.TRAINER)), Depends(same_wire)]
    filling = [Depends(allow(Role.BATCH)), Depends(same_wire)]

    @app.get("/v1/fills", dependencies=watching)
    async def list_fills() -> dict[str, Any]:
        """List the jobs that fill corpora, those that have ended too."""
        return {"format": wire.WIRE_VERSION, "fills": [job.to_json() for job in service.fills.jobs()]}

    @app.get(_PATH, dependencies=watching)
    async def get_fill(corpus: str, teacher: str) -> dict[str, Any]:
        """Tell how far a job is."""
        return _answer(service.fills.job(corpus, teacher))

    @app.put(_PATH, dependencies=filling)
    async def put_fill(corpus: str, teacher: str, wanted: FillWanted, request: Request) -> dict[str, Any]:
        """Begin to fill a corpus (role batch), or tell of the job that is at it with the same order."""
        most = service.limits.max_tokens_in_flight
        order = FillOrder(
            fields=Fields.from_json(wanted.fields),
            encoding=wanted.encoding,
            batch_tokens=min(wanted.batch_tokens, most),
            in_flight=wanted.in_flight,
        )

        def front() -> Teacher:
            # Without the cache in front, which would keep the corpus's targets in the journal as well.
            return service.teacher(teacher).front(store=False)

        find_caller = _finding(service.access, request)
        return _answer(await service.fills.start(corpus, teacher, order, front, find_caller))

    @app.delete(_PATH, dependencies=filling)
    async def delete_fill(corpus: str, teacher: str) -> dict[str, Any]:
        """Stop a job (role batch); what is committed stays."""
        return _answer(await service.fills.stop(corpus, teacher))


def _finding(access: Access, request: Request) -> Callable[[], Caller]:
    """Make a function that finds the request's caller anew, by the keys at the time of its call."""
    name = current_caller().name
    # Of the request only the key is kept, for as long as the job runs.
    headers = Headers({"authorization": request.headers.get("authorization", "")})

    def find() -> Caller:
        try:
            who = access.identify(headers)
        except Unauthenticated as error:
            raise Unauthenticated(
                f"the key {name!r}, which started this fill, is not known any more; start it with another to go on"
            ) from error
        if not who.role.includes(Role.BATCH):
            raise Forbidden(
                f"the key {name!r}, which started this fill, has the role {who.role.value} by now and needs "
                f"{Role.BATCH.value}; start it with another to go on"
            )
        return who

    return find


def _answer(job: FillJob) -> dict[str, JSON]:
    return {"format": wire.WIRE_VERSION, **job.to_json()}
