from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import Cache
from potstill.cache.errors import InvalidInput
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.telemetry.tracing import OtelTracer, current_tracer, open_tracer, span
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, post_json, serving, wait_ready
from tests.support.waiting import until

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def spans() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: Any) -> Iterator[OtelTracer]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    made = OtelTracer(provider)
    yield made
    made.close()


@pytest.fixture
def traced_url(tracer: OtelTracer, spans: Any, tmp_path: Path) -> Iterator[str]:
    keep = Keep(Cache.open(tmp_path / "cache", mode="r+"), KeepPolicy())
    service = Service([hosted("smol", FakeTeacher(), keep)], cache=keep.cache)
    with serving(create_app(service, tracer=tracer)) as url:
        wait_ready(url)
        yield url


def test_a_miss_has_spans_down_to_the_engine_and_a_hit_has_not(traced_url: str, spans: Any) -> None:
    for _ in range(2):
        post_json(traced_url, {"rows": [[1, 2, 3]]}, traceparent=f"00-{PARENT}-00f067aa0ba902b7-01")
    http.get(f"{traced_url}/healthz")
    route = "POST /v1/teachers/{name}/score"
    until(lambda: sum(each.name in (route, "GET /healthz") for each in spans.get_finished_spans()) == 3)
    found = [each for each in spans.get_finished_spans() if each.name != "GET /readyz"]
    assert sorted(each.name for each in found) == sorted([route, "score"] * 2 + ["admission", "engine", "GET /healthz"])
    by_name = {each.name: each for each in found}
    first = min((each for each in found if each.name == "score"), key=lambda each: each.start_time)
    assert by_name["engine"].parent.span_id == by_name["admission"].parent.span_id == first.context.span_id
    assert {f"{each.context.trace_id:032x}" for each in found if each.name != "GET /healthz"} == {PARENT}
    assert dict(by_name["engine"].attributes) == {"rows": 1, "tokens": 3}
    assert by_name[route].attributes["http.response.status_code"] == 200


def test_without_a_tracer_a_span_is_nothing(tracer: OtelTracer, spans: Any) -> None:
    from opentelemetry.trace import get_current_span

    with span("anything", tokens=3):
        assert not get_current_span().is_recording()
    token = current_tracer.set(tracer)
    with span("something", tokens=3):
        assert get_current_span().is_recording()
    current_tracer.reset(token)
    assert [each.name for each in spans.get_finished_spans()] == ["something"]


def test_tracing_without_the_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidInput, match=r"tracing.endpoint is 'http://x'.*potstill\[otel\]"):
        open_tracer("http://x")


def test_spans_are_sent_to_the_endpoint(tmp_path: Path) -> None:
    """A collector gets them at the latest when the service closes."""
    got: list[bytes] = []

    async def collector(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            more = True
            while more:
                message = await receive()
                got.append(message["body"])
                more = message["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with serving(collector) as collector_url:
        tracer = open_tracer(f"{collector_url}/v1/traces")
        with serving(create_app(Service([hosted("smol", FakeTeacher())]), tracer=tracer)) as url:
            wait_ready(url)
        tracer.close()
    assert b"GET /readyz" in b"".join(got)
