"""ASGI middleware around everything: request ids, the metrics of requests, access lines, the request's span.

It wraps the answer to unexpected failures as well, so that those are counted and carry their id too.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from potstill.teacher_service.hosting import Metrics
from potstill.teacher_service.telemetry.logs import (
    REQUEST_ID_HEADER,
    AccessRecord,
    begin_record,
    choose_request_id,
    request_id,
)
from potstill.teacher_service.telemetry.tracing import OtelTracer, current_tracer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ACCESS = logging.getLogger("potstill.teacher_service.access")
_CLIENT_LEFT = 499
_PROBES = frozenset({"/healthz", "/readyz", "/health", "/metrics"})
"""Routes that machines ask every few seconds: their good answers are logged at level debug."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class WatchedApp:
    """Serves each request under an id and records its outcome, even a failure or a client that left."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: OtelTracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        current = choose_request_id(headers.get(REQUEST_ID_HEADER))
        # Not reset at the end: the server's own log line of a failure still belongs to the request.
        request_id.set(current)
        current_tracer.set(self._tracer)
        record = begin_record()
        status = _CLIENT_LEFT  # unless an answer begins

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = current
            await send(message)

        begin = time.perf_counter()
        traced = nullcontext() if self._tracer is None else self._tracer.request(_method(scope), headers)
        with traced as span:
            try:
                await self._app(scope, receive, sending)
            finally:
                if span is not None:
                    span.update_name(f"{_method(scope)} {_route(scope)}")
                    span.set_attributes(
                        {
                            "http.route": _route(scope),
                            "http.response.status_code": status,
                            "potstill.request_id": current,
                        }
                    )
                self._record(scope, status, time.perf_counter() - begin, record)

    def _record(self, scope: Scope, status: int, seconds: float, record: AccessRecord) -> None:
        method, route = _method(scope), _route(scope)
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.requests.labels(method, route, str(status)).inc()
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
            **asdict(record),
        }
        well = route in _PROBES and HTTPStatus.OK <= status < HTTPStatus.BAD_REQUEST
        _ACCESS.log(logging.DEBUG if well else logging.INFO, "request", extra={"fields": fields})


def _method(scope: Scope) -> str:
    # A method that a caller made up must not become a label: labels live as long as the process.
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    """The route's pattern and not the path, which holds names that callers choose."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
