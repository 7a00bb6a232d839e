"""Metrics of one service, as Prometheus text, each service with its own registry.

Counters and histograms are kept here; what the parts of the service know is read from them when it is asked for.

Labels are names given by admins (teachers) or by the service (replicas, routes), or from closed lists. Nothing that a
caller made up is one, because every label lives as long as the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from potstill.cache.errors import TeacherFailed, Unavailable, error_kinds
from potstill.teacher_service.access import Access
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, State
from potstill.teacher_service.replicas import ReplicaPool, ReplicaState
from potstill.teacher_service.telemetry import span
from potstill.teacher_service.telemetry.logs import access_record

# Seconds: from a hit in the page cache to a long prefill batch.
_LATENCY_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_LONGEST_LABEL = 64


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


class ServiceCollector(Collector):
    """Admission's counts and queues; the state, the replicas and the cache of every teacher."""

    def __init__(self, admission: Admission, teachers: Mapping[str, HostedTeacher], access: Access) -> None:
        self._admission = admission
        self._teachers = teachers
        self._access = access

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        teachers = list(self._teachers.values())
        pools = {teacher.name: pool for teacher in teachers if (pool := pool_of(teacher)) is not None}
        unreadable = "1 while the file of API keys cannot be read, so that no key is good."
        yield GaugeMetricFamily("potstill_keys_unreadable", unreadable, value=float(self._access.failed))
        yield from self._admitted()
        yield from self._queues()
        yield _states(teachers)
        yield _capture_paths(pools)
        yield from _replicas(pools)
        yield from _kept(teachers)

    def _admitted(self) -> Iterator[Metric]:
        admission = self._admission
        yield GaugeMetricFamily(
            "potstill_requests_in_flight",
            "Score requests that are read or looked up, until their answer is made or their rows begin to wait for an "
            "engine; what waits is in potstill_tokens_waiting.",
            value=admission.requests_in_flight,
        )
        refusals = CounterMetricFamily(
            "potstill_admission_refusals", "Calls that were not let in, by the bound they met.", labels=["reason"]
        )
        for reason, count in sorted(admission.refusals.items()):
            refusals.add_metric([reason], count)
        yield refusals

    def _queues(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "potstill_tokens_waiting", "Tokens that wait for their turn in the engine.", labels=["teacher"]
        )
        inside = GaugeMetricFamily("potstill_tokens_in_flight", "Tokens inside the engine.", labels=["teacher"])
        rate = GaugeMetricFamily(
            "potstill_tokens_per_second",
            "Scored lately while there was work; admission plans by it.",
            labels=["teacher"],
        )
        for name, queue in self._admission.queues.items():
            waiting.add_metric([name], queue.tokens_waiting)
            inside.add_metric([name], queue.tokens_in_flight)
            rate.add_metric([name], queue.tokens_per_second)
        yield from (waiting, inside, rate)


def pool_of(teacher: HostedTeacher) -> ReplicaPool | None:
    """The teacher's replicas, or None while it has none."""
    try:
        return teacher.pool
    except (TeacherFailed, Unavailable):  # it did not start, starts, or is being removed
        return None


def _states(teachers: list[HostedTeacher]) -> Metric:
    family = GaugeMetricFamily(
        "potstill_teacher_state", "1 for the state that the teacher is in.", labels=["teacher", "state"]
    )
    for teacher in teachers:
        for state in get_args(State):
            family.add_metric([teacher.name, state], float(teacher.state == state))
    return family


def _capture_paths(pools: Mapping[str, ReplicaPool]) -> Metric:
    family = GaugeMetricFamily(
        "potstill_capture_path_info",
        "How targets leave the engine; always 1.",
        labels=["teacher", "capture_path"],
    )
    for name, pool in pools.items():
        # Another service names its own path, so its length is not ours to trust.
        family.add_metric([name, pool.provenance.capture_path[:_LONGEST_LABEL]], 1.0)
    return family


def _replicas(pools: Mapping[str, ReplicaPool]) -> Iterator[Metric]:
    states = GaugeMetricFamily("potstill_replicas", "Replicas by state.", labels=["teacher", "state"])
    targets = GaugeMetricFamily("potstill_replicas_target", "Replicas wanted.", labels=["teacher"])
    waiting = GaugeMetricFamily(
        "potstill_replica_tokens_waiting", "Tokens sent to a replica and not answered.", labels=["teacher", "replica"]
    )
    scored = CounterMetricFamily(
        "potstill_replica_scored_tokens", "Tokens scored by a replica.", labels=["teacher", "replica"]
    )
    for name, pool in pools.items():
        status = pool.status
        for state in get_args(ReplicaState):
            states.add_metric([name, state], sum(replica.state == state for replica in status.each))
        targets.add_metric([name], status.target)
        for replica in status.each:
            waiting.add_metric([name, replica.name], replica.tokens_waiting)
            scored.add_metric([name, replica.name], replica.tokens_scored)
    yield from (states, targets, waiting, scored)


def _kept(teachers: list[HostedTeacher]) -> Iterator[Metric]:
    rows = CounterMetricFamily(
        "potstill_cache_rows", "Rows by what the cache did for them.", labels=["teacher", "result"]
    )
    failing = GaugeMetricFamily(
        "potstill_store_failing", "1 while answers of the teacher cannot be kept.", labels=["teacher"]
    )
    journal = GaugeMetricFamily(
        "potstill_journal_bytes", "Stored answers that belong to no corpus.", labels=["teacher"]
    )
    for teacher in teachers:
        if teacher.cached is not None:
            counters = teacher.cached.counters
            rows.add_metric([teacher.name, "hit"], counters.hits)
            rows.add_metric([teacher.name, "miss"], counters.misses)
            rows.add_metric([teacher.name, "joined"], counters.joined)
            failing.add_metric([teacher.name], float(bool(teacher.cached.store_error)))
            journal.add_metric([teacher.name], teacher.cached.journal_bytes)
    yield from (rows, failing, journal)
