"""Health of the service (`/healthz`, `/readyz`) and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from potstill.teacher_service.hosting import Service

_NO_KEYS = "the API keys cannot be read, so nobody is let in; the log says why"
_NO_TEACHER = "there is no teacher; what the cache has committed is served"
_NOTHING = "there is no teacher and no cache; add a teacher with `potstill teachers add NAME=MODEL`"


def add_status_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to the app."""

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process lives. Needs no key."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Say whether every teacher is up (200) or not (503), and why. Needs no key.

        Of a service without teachers it says whether a cache is served.
        """
        states = {name: teacher.state for name, teacher in service.teachers.items()}
        content: dict[str, Any] = {"status": "ready" if service.ready else "not ready", "teachers": states}
        failures = {name: teacher.failure for name, teacher in service.teachers.items() if teacher.failure}
        if failures:
            content["failures"] = failures
        if service.access.failed:
            content["detail"] = _NO_KEYS
        elif not states:
            content["detail"] = _NO_TEACHER if service.ready else _NOTHING
        return JSONResponse(content, status_code=200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give the metrics that Prometheus reads."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
