"""Counters and histograms of one service, as Prometheus text, each service with its own registry.

Labels are names given by admins (teachers) or by the service (replicas, routes), or from closed lists. Nothing that a
caller made up is one, because every label lives as long as the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from potstill.cache.errors import error_kinds
from potstill.teacher_service.access import Access
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.hosting.collectors import ServiceCollector
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.telemetry import span
from potstill.teacher_service.telemetry.logs import access_record

# Seconds: from a hit in the page cache to a long prefill batch.
_LATENCY_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The counters of one service."""

    def __init__(self, admission: Admission, teachers: Mapping[str, HostedTeacher], access: Access) -> None:
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
        self.score_seconds = Histogram(
            "potstill_score_seconds",
            "From a decoded score request to its targets: cache, queue and engine.",
            ["teacher"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.refusals = Counter("potstill_refusals", "Refusals by error kind.", ["kind"], registry=registry)
        # From zero on: a rate does not see a counter's first value.
        for kind in error_kinds():
            self.refusals.labels(kind)
        self.rows = Counter("potstill_scored_rows", "Rows answered.", ["teacher"], registry=registry)
        self.tokens = Counter("potstill_scored_tokens", "Tokens answered.", ["teacher"], registry=registry)
        registry.register(ServiceCollector(admission, teachers, access))
        ProcessCollector(registry=registry)

    @contextmanager
    def scoring(self, teacher: str, *, rows: int, tokens: int) -> Iterator[None]:
        """Trace the scoring of one request in the block, and count its seconds, rows and tokens once it has succeeded.

        Refused requests end in a moment; counted too, they would make a service that answers nothing look fast.
        """
        record = access_record()
        record.rows, record.tokens = rows, tokens
        begin = time.perf_counter()
        with span("score", teacher=teacher, rows=rows, tokens=tokens):
            yield
        self.score_seconds.labels(teacher).observe(time.perf_counter() - begin)
        self.rows.labels(teacher).inc(rows)
        self.tokens.labels(teacher).inc(tokens)

    def value(self, name: str, **labels: str) -> float:
        """The present value of one sample; 0 where nothing was counted."""
        return self._registry.get_sample_value(name, labels) or 0.0

    @property
    def num_refusals(self) -> float:
        """Refusals of every kind."""
        return sum(self.value("potstill_refusals_total", kind=kind) for kind in error_kinds())

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
