"""`GET /v1/overview`: the data of the page at `/`, in one answer."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import Depends, FastAPI

from potstill.cache.types import JSON
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.hosting import HostedTeacher, Service
from potstill.teacher_service.hosting.coverage import Coverage
from potstill.teacher_service.hosting.metrics import pool_of


def add_overview_routes(app: FastAPI, service: Service) -> None:
    """Add the route to the app."""
    coverage = Coverage(service.cache)

    @app.get("/v1/overview", dependencies=[Depends(allow(Role.TRAINER))])
    async def overview() -> dict[str, Any]:
        """Give what the page at `/` shows: teachers, queues, rates and coverage."""
        found = await coverage.latest()
        return {
            # The page computes rates as differences of counters over this clock; both begin anew with the process.
            "clock": time.monotonic(),
            "ready": service.ready,
            "queue": {
                "requests_in_flight": service.admission.requests_in_flight,
                "tokens_in_flight": service.admission.tokens_in_flight,
                "tokens_waiting": service.admission.tokens_waiting,
            },
            "refusals": service.metrics.num_refusals,
            "teachers": [_describe(service, teacher) for teacher in list(service.teachers.values())],
            "coverage": None if found is None else [asdict(corpus) for corpus in found],
            "coverage_error": coverage.error,
        }


def _queue_of(admission: Admission, teacher: str) -> dict[str, JSON] | None:
    queue = admission.queues.get(teacher)
    if queue is None:
        return None
    return {
        "tokens_waiting": queue.tokens_waiting,
        "tokens_in_flight": queue.tokens_in_flight,
        "tokens_per_second": queue.tokens_per_second,
    }


def _describe(service: Service, teacher: HostedTeacher) -> dict[str, Any]:
    pool, cached = pool_of(teacher), teacher.cached
    return {
        "name": teacher.name,
        "state": teacher.state,
        "cause": teacher.failure,
        "model": None if pool is None else pool.identity.model,
        "capture_path": None if pool is None else pool.provenance.capture_path,
        "replicas": None if pool is None else asdict(pool.status),
        "queue": _queue_of(service.admission, teacher.name),
        "tokens": service.metrics.value("potstill_scored_tokens_total", teacher=teacher.name),
        "rows": None if cached is None else asdict(cached.counters),
        "store_error": "" if cached is None else cached.store_error,
        "journal_bytes": None if cached is None else cached.journal_bytes,
    }
