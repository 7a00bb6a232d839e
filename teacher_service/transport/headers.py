"""Headers of answers: ETags of immutable content, and the instructions that go with errors, like `Retry-After`."""

from __future__ import annotations

import hashlib
import json
import math

from starlette.requests import Request
from starlette.responses import Response

from potstill.cache.errors import PotstillError, RequestTimeout, Unauthenticated
from potstill.cache.types import JSON
from potstill.cache.wire import scores as wire


def strong_etag(media_type: str, *parts: JSON) -> str:
    """The ETag of content that `parts` determine, as sent in this wire version and media type."""
    named = json.dumps([wire.WIRE_VERSION, media_type, *parts], sort_keys=True, separators=(",", ":"))
    return f'"{hashlib.sha256(named.encode()).hexdigest()[:40]}"'


def immutable_headers(etag: str) -> dict[str, str]:
    """Headers of an answer that will never change."""
    return {"etag": etag, "cache-control": "private, immutable", "vary": "accept"}


def not_modified(request: Request, etag: str) -> Response | None:
    """The 304 for a caller that has this content already, else None (RFC 9110, 13.1.2: a list of ETags, or `*`)."""
    held = {part.strip().removeprefix("W/") for part in ",".join(request.headers.getlist("if-none-match")).split(",")}
    return Response(status_code=304, headers=immutable_headers(etag)) if held & {etag, "*"} else None


def error_headers(error: PotstillError) -> dict[str, str]:
    """Headers that go with an error; `Retry-After`, in whole seconds from 1, where the call may be tried again."""
    headers: dict[str, str] = {}
    if error.retryable:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 0)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = 'Bearer realm="potstill"'
    if isinstance(error, RequestTimeout):
        headers["connection"] = "close"  # the rest of the body, however slowly it comes, is not waited for
    return headers
