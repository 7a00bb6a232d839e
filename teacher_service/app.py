"""The ASGI app of one `Service`: routes, middleware, and the answers to errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from potstill.cache.errors import InvalidInput, NotFound, PotstillError
from potstill.cache.wire import scores as wire
from potstill.teacher_service.access import AccessApp
from potstill.teacher_service.hosting import Metrics, Service
from potstill.teacher_service.routes import openapi
from potstill.teacher_service.routes.admin import add_admin_routes
from potstill.teacher_service.routes.completions.routes import add_completion_routes, error_response, is_openai_path
from potstill.teacher_service.routes.corpora.routes import add_corpus_routes
from potstill.teacher_service.routes.doctor import add_doctor_routes
from potstill.teacher_service.routes.overview import add_overview_routes
from potstill.teacher_service.routes.page import add_page_routes
from potstill.teacher_service.routes.score import add_score_routes
from potstill.teacher_service.routes.status import add_status_routes
from potstill.teacher_service.telemetry.tracing import OtelTracer
from potstill.teacher_service.transport import BoundedTransfers
from potstill.teacher_service.transport.headers import error_headers
from potstill.teacher_service.watched_app import WatchedApp

_LOG = logging.getLogger(__name__)


def create_app(service: Service, *, tracer: OtelTracer | None = None) -> FastAPI:
    """Build the ASGI app. Its lifespan starts and stops the service's teachers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="potstill", lifespan=lifespan, openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    answer_error = _add_error_answers(app, service.metrics)
    app.add_middleware(BoundedTransfers, admission=service.admission, answer_error=answer_error)
    # Added last, so it comes first: callers are known before a byte of their bodies is read or counted.
    app.add_middleware(AccessApp, access=service.access, answer_error=answer_error)
    add_status_routes(app, service)
    add_admin_routes(app, service)
    add_score_routes(app, service)
    add_corpus_routes(app, service)
    add_completion_routes(app, service)
    add_doctor_routes(app, service)
    add_overview_routes(app, service)
    add_page_routes(app)
    openapi.describe(app, version=wire.WIRE_VERSION)
    # Around everything, even the answer to bugs. Routes and middleware added after this are not served.
    app.middleware_stack = WatchedApp(app.build_middleware_stack(), service.metrics, tracer)
    return app


def _add_error_answers(app: FastAPI, metrics: Metrics) -> Callable[[Request, PotstillError], Response]:
    def answer(
        request: Request, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        metrics.refusals.labels(kind).inc()
        if is_openai_path(request.scope["path"]):
            return error_response(status, detail, headers)
        return JSONResponse({"kind": kind, "detail": detail}, status_code=status, headers=headers)

    def answer_error(request: Request, error: PotstillError) -> Response:
        return answer(request, error.status, error.kind, error.detail, error_headers(error))

    @app.exception_handler(PotstillError)
    async def on_error(request: Request, error: PotstillError) -> Response:
        return answer_error(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return answer_error(request, InvalidInput(f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, PotstillError):
            return answer_error(request, error.__cause__)  # FastAPI hides what went wrong while it read a body
        kind = NotFound.kind if error.status_code == NotFound.status else InvalidInput.kind
        detail = f"{request.method} {_path(request)}: {error.detail}"
        return answer(request, error.status_code, kind, detail, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the metrics: nobody reads it

    @app.exception_handler(Exception)
    async def on_bug(request: Request, _: Exception) -> Response:
        # The server logs the traceback when this exception reaches it; the caller learns no insides.
        _LOG.error("%s %s failed unexpectedly; the traceback follows", request.method, _path(request))
        return answer(request, 500, PotstillError.kind, "the service failed unexpectedly; its log has the cause")

    return answer_error


def _path(request: Request) -> str:
    """The path, as far as a message or log line tells it."""
    return str(request.scope["path"][:200])
