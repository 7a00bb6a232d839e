"""Talking to a Potstill service: `HttpTeacher`, its form for threads, `HttpCache`, and the `potstill` command.

`import clients` is fast: httpx and pyarrow are imported when a name that needs them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.clients.http_targets import HttpCache
    from potstill.clients.http_teacher import HttpTeacher, SyncHttpTeacher
    from potstill.clients.retry import RetryPolicy

__all__ = ["HttpCache", "HttpTeacher", "RetryPolicy", "SyncHttpTeacher"]


def __getattr__(name: str) -> Any:
    if name == "RetryPolicy":
        from potstill.clients import retry  # noqa: PLC0415  only when it is used

        return retry.RetryPolicy
    if name == "HttpCache":
        from potstill.clients import http_targets  # noqa: PLC0415  the same

        return http_targets.HttpCache
    if name in __all__:
        from potstill.clients import http_teacher  # noqa: PLC0415  the same

        return getattr(http_teacher, name)
    raise AttributeError(f"module 'clients' has no attribute {name!r}")
