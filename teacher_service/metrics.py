"""What the service counts, as Prometheus text. Every service has its own registry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from teacher_service.admission import Admission
from teacher_service.replicas import HostedTeacher

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds: from a hit in the page cache to a long prefill batch.
_LATENCY_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The counters of one service."""

    def __init__(self, admission: Admission, teachers: Mapping[str, HostedTeacher]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "potstill_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "potstill_request_seconds",
            "From the first byte asked to the last answered.",
            ["route"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.refusals = Counter("potstill_refusals", "Refusals by error kind.", ["kind"], registry=registry)
        self.rows = Counter("potstill_scored_rows", "Rows answered.", ["teacher"], registry=registry)
        self.tokens = Counter("potstill_scored_tokens", "Tokens answered.", ["teacher"], registry=registry)
        tokens = Gauge("potstill_tokens_in_flight", "Tokens being scored.", registry=registry)
        tokens.set_function(lambda: admission.tokens_in_flight)
        requests = Gauge("potstill_requests_in_flight", "Requests being served.", registry=registry)
        requests.set_function(lambda: admission.requests_in_flight)
        registry.register(_CacheRows(teachers))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _CacheRows(Collector):
    """Hits, misses and joined rows, read from the cached teachers when they are asked for."""

    def __init__(self, teachers: Mapping[str, HostedTeacher]) -> None:
        self._teachers = teachers

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "potstill_cache_rows", "Rows by what the cache did for them.", labels=["teacher", "result"]
        )
        for name, teacher in self._teachers.items():
            if teacher.cached is not None:
                counters = teacher.cached.counters
                family.add_metric([name, "hit"], counters.hits)
                family.add_metric([name, "miss"], counters.misses)
                family.add_metric([name, "joined"], counters.joined)
        yield family


class MeasuredApp:
    """ASGI middleware: counts and times every HTTP request by its route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and record it, whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # what is recorded when the client left before the answer began

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begin = time.perf_counter()
        try:
            await self._app(scope, receive, sending)
        finally:
            # The pattern, not the path: paths hold names that callers choose, and labels live forever.
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
