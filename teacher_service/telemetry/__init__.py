"""Log lines and spans, and the request's id that both carry."""

from potstill.teacher_service.telemetry.tracing import span

__all__ = ["span"]
