"""Log lines and spans, and the request's id that both carry."""

from __future__ import annotations

from potstill.teacher_service.telemetry.tracing import span

__all__ = ["span"]
