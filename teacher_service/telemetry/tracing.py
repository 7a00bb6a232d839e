"""Spans of OpenTelemetry, if it is installed and configured; otherwise a span costs one lookup.

The tracer of a request is in a context variable, so that tasks that the request starts go on with its trace. Parents
come as W3C `traceparent` headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from potstill.cache.errors import InvalidInput
from potstill.cache.extras import missing_module

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


class OtelTracer:
    """Makes spans by a `TracerProvider` of the OpenTelemetry SDK."""

    def __init__(self, provider: Any) -> None:
        # Imported here, as everywhere below, because it is an extra that most services do without.
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self.tracer: Tracer = provider.get_tracer("potstill")
        self._provider = provider
        self._propagator = TraceContextTextMapPropagator()

    def request(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[Any]:
        """Open the span of a whole request, below the parent that its headers name."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        parent = self._propagator.extract(dict(headers))
        return self.tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER)

    def close(self) -> None:
        """Send the spans that are waiting, and stop."""
        self._provider.shutdown()


current_tracer: ContextVar[OtelTracer | None] = ContextVar("current_tracer", default=None)
"""Tracer of the request that is being served; None when nothing is traced."""


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """Time the block as a span of the current request's trace."""
    tracer = current_tracer.get()
    if tracer is None:
        yield
        return
    with tracer.tracer.start_as_current_span(name, attributes=attributes):
        yield


def open_tracer(endpoint: str) -> OtelTracer:
    """Open a tracer that sends spans in batches to an OTLP/HTTP endpoint like `http://collector:4318/v1/traces`.

    Raises:
        InvalidInput: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            f"tracing.endpoint is {endpoint!r}, which {missing_module(error)}; or take the endpoint away"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "potstill"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTracer(provider)
