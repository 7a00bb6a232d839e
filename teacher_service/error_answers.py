"""What the headers of an error's answer tell the caller to do next."""

from __future__ import annotations

import math

from cache.errors import PotstillError, RequestTimeout, Unauthenticated


def error_headers(error: PotstillError) -> dict[str, str]:
    """Headers that go with an error; `Retry-After`, in whole seconds from 1, where the call may be tried again."""
    headers: dict[str, str] = {}
    if error.retryable:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 0)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = 'Bearer realm="potstill"'
    if isinstance(error, RequestTimeout):
        headers["connection"] = "close"  # what still comes, however slowly, is not waited for
    return headers
