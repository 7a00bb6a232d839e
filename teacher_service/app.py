"""The HTTP API: rows in, targets out. `create_app` makes it for one `Service`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cache import wire
from cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    NotFound,
    PotstillError,
    UnknownCorpus,
    UnknownTeacher,
)
from cache.types import JSON, Fields, Targets
from teacher_service.admission import (
    Admission,
    answer_format,
    bytes_per_position,
    check_request,
    read_body,
    request_format,
    timeout_seconds,
)
from teacher_service.metrics import MeasuredApp, Metrics
from teacher_service.replicas import HostedTeacher
from teacher_service.settings import LimitSettings

if TYPE_CHECKING:
    from cache.cache import Cache
    from cache.targets import TargetSet

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 1
_DETAIL_CHARACTERS = 1000
_SMALL_BYTES = 64 * 2**10  # (de)serialised on the event loop: less than a millisecond


@dataclass(frozen=True, slots=True)
class Service:
    """What the API serves. Teachers start with the app's lifespan and stop with it."""

    teachers: Mapping[str, HostedTeacher]
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


class ReplicasWanted(BaseModel):
    """The body of `PUT /v1/teachers/{name}/replicas`."""

    model_config = ConfigDict(extra="forbid")
    replicas: Annotated[int, Field(ge=1, strict=True)]


def create_app(service: Service) -> FastAPI:
    """The ASGI app. Its lifespan runs the service's teachers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # The score bodies are Arrow streams, which OpenAPI cannot describe; the README does.
    app = FastAPI(title="potstill", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(MeasuredApp, metrics=service.metrics)
    _add_error_answers(app, service.metrics)
    _add_status_routes(app, service)
    _add_teacher_routes(app, service)
    _add_corpus_routes(app, service)
    return app


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        states = {name: teacher.state for name, teacher in service.teachers.items()}
        content = {"status": "ready" if service.ready else "not ready", "teachers": states}
        return JSONResponse(content, status_code=200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "owned_by": "potstill"} for name in service.teachers]
        return {"object": "list", "data": data}


def _add_teacher_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/teachers")
    async def list_teachers() -> dict[str, Any]:
        return {"teachers": [_describe(teacher) for teacher in service.teachers.values()]}

    @app.get("/v1/teachers/{name}")
    async def one_teacher(name: str) -> dict[str, Any]:
        teacher = service.teacher(name)
        _ = teacher.pool  # Unavailable while it starts, so that a client waits for the identity
        return _describe(teacher)

    @app.post("/v1/teachers/{name}/score")
    async def score(name: str, request: Request) -> Response:
        teacher = service.teacher(name)
        with service.admission.request():
            return await _while_connected(request, await _prepare_score(service, teacher, request))

    @app.get("/v1/teachers/{name}/replicas")
    async def get_replicas(name: str) -> dict[str, int]:
        return asdict(service.teacher(name).pool.status)

    @app.put("/v1/teachers/{name}/replicas")
    async def put_replicas(name: str, wanted: ReplicasWanted) -> dict[str, int]:
        return asdict(await service.teacher(name).pool.scale(wanted.replicas))


def _add_corpus_routes(app: FastAPI, service: Service) -> None:
    cache = service.cache

    # Opened sets stay open: a reader of many ranges pays for the metadata once.
    @lru_cache(maxsize=64)
    def open_targets(teacher: str, corpus: str) -> TargetSet:
        if cache is None:
            raise UnknownCorpus("this service has no cache; start it with --cache")
        return cache.targets(teacher, corpus).top_k_only()

    @app.get("/v1/corpora")
    async def list_corpora() -> dict[str, Any]:
        return {"corpora": [] if cache is None else await asyncio.to_thread(_describe_corpora, cache)}

    @app.get("/v1/corpora/{corpus}/targets/{teacher}")
    async def read_targets(
        corpus: str,
        teacher: str,
        request: Request,
        start: Annotated[int, Query(ge=0)],
        stop: Annotated[int, Query(ge=0)],
    ) -> Response:
        writes = answer_format(request, wire.ARROW_MEDIA_TYPE)
        bound = service.limits.max_range_positions
        if stop <= start:
            raise InvalidInput(f"stop={stop} is not after start={start}")
        if stop - start > bound:
            raise LimitExceeded(f"{stop - start} positions are over max_range_positions={bound}; read fewer")
        with service.admission.request():
            return await asyncio.to_thread(lambda: _read_range(open_targets(teacher, corpus), (start, stop), writes))


def _add_error_answers(app: FastAPI, metrics: Metrics) -> None:
    def answer(status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
        metrics.refusals.labels(kind).inc()
        detail = detail[:_DETAIL_CHARACTERS]  # a message may quote what the caller sent
        return JSONResponse({"kind": kind, "detail": detail}, status_code=status, headers=headers)

    @app.exception_handler(PotstillError)
    async def on_error(_: Request, error: PotstillError) -> Response:
        headers = {"retry-after": str(_RETRY_AFTER_SECONDS)} if error.retryable else None
        return answer(error.status, error.kind, error.detail, headers)

    @app.exception_handler(RequestValidationError)
    async def on_validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return answer(InvalidInput.status, InvalidInput.kind, f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        kind = NotFound.kind if error.status_code == NotFound.status else InvalidInput.kind
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return answer(error.status_code, kind, detail, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; it is what the metrics count

    @app.exception_handler(Exception)
    async def on_bug(request: Request, _: Exception) -> Response:
        # The server logs the traceback when this exception reaches it; the caller learns no insides.
        _LOG.error("%s %s failed unexpectedly; the traceback follows", request.method, request.url.path)
        return answer(500, PotstillError.kind, "the service failed unexpectedly; its log has the cause")


def _describe(teacher: HostedTeacher) -> dict[str, JSON]:
    description: dict[str, JSON] = {"name": teacher.name, "state": teacher.state}
    if teacher.state == "ready":
        pool = teacher.pool
        description["identity"] = pool.identity.to_json()
        description["provenance"] = pool.provenance.to_json()
        description["limits"] = asdict(pool.limits)
    return description


def _describe_corpora(cache: Cache) -> list[dict[str, JSON]]:
    described: list[dict[str, JSON]] = []
    for name in cache.corpora():
        corpus = cache.corpus(name)
        described.append(
            {
                "name": name,
                "rows": len(corpus),
                "positions": corpus.num_positions,
                "shards": corpus.num_shards,
                "tokenizer_sha256": corpus.tokenizer_sha256,
                "teachers": list(cache.teachers(name)),
            }
        )
    return described


def _read_range(target_set: TargetSet, positions: tuple[int, int], writes: str) -> Response:
    targets = target_set.read(*positions)
    return _answer(wire.ScoreAnswer(target_set.identity, [targets]), Fields(k=targets.k), writes)


async def _prepare_score(service: Service, teacher: HostedTeacher, request: Request) -> Coroutine[Any, Any, Response]:
    """Check and read everything that needs no teacher; the coroutine does the rest."""
    reads = request_format(request)
    writes = answer_format(request, reads)
    seconds = timeout_seconds(request)
    front = teacher.front(store="no-store" not in request.headers.get("cache-control", "").lower())
    body = await read_body(request, service.limits.max_body_bytes)
    decode = _from_json if reads == wire.JSON_MEDIA_TYPE else wire.request_from_arrow

    async def finish() -> Response:
        asked = await _off_loop(len(body), lambda: decode(body))
        num_tokens = check_request(asked.rows, asked.fields, teacher=front, limits=service.limits)
        with service.admission.tokens(num_tokens):
            targets = await _within(seconds, front.score(asked.rows, asked.fields))
        service.metrics.rows.labels(teacher.name).inc(len(targets))
        service.metrics.tokens.labels(teacher.name).inc(num_tokens)
        answer = wire.ScoreAnswer(front.identity, targets)
        size = num_tokens * bytes_per_position(asked.fields, front.identity.vocab_size)
        return await _off_loop(size, lambda: _answer(answer, asked.fields, writes))

    return finish()


def _from_json(body: bytes) -> wire.ScoreRequest:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    return wire.request_from_json(value)


def _answer(answer: wire.ScoreAnswer, fields: Fields, writes: str) -> Response:
    if writes == wire.JSON_MEDIA_TYPE:
        return JSONResponse(wire.answer_to_json(answer))
    return Response(wire.answer_to_arrow(answer, fields), media_type=wire.ARROW_MEDIA_TYPE)


async def _off_loop(num_bytes: int, call: Callable[[], T]) -> T:
    return call() if num_bytes < _SMALL_BYTES else await asyncio.to_thread(call)


async def _within(seconds: float | None, scoring: Coroutine[Any, Any, list[Targets]]) -> list[Targets]:
    try:
        async with asyncio.timeout(seconds) as deadline:
            return await scoring
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise DeadlineExceeded(f"not scored within the {seconds:g} seconds that the caller gave") from error


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or cancel it when the client leaves: nobody would read the answer."""
    working = asyncio.create_task(work)
    # The body is read, so the next message says that the client left.
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
