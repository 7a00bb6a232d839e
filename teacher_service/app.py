"""The HTTP API: rows in, targets out. `create_app` makes it for one `Service`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cache.errors import InvalidInput, NotFound, PotstillError
from teacher_service.admin_routes import add_admin_routes
from teacher_service.corpus_routes import add_corpus_routes
from teacher_service.metrics import MeasuredApp, Metrics
from teacher_service.score_routes import add_score_routes
from teacher_service.service import Service
from teacher_service.status_routes import add_status_routes

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 1
_DETAIL_CHARACTERS = 1000


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
    add_status_routes(app, service)
    add_admin_routes(app, service)
    add_score_routes(app, service)
    add_corpus_routes(app, service)
    return app


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
