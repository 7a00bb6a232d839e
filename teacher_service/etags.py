"""ETags of what never changes, made of what names it and not of its bytes, and the requests that depend on them."""

from __future__ import annotations

import hashlib
import json

from starlette.requests import Request
from starlette.responses import Response

from cache import wire
from cache.types import JSON

IMMUTABLE = "private, immutable"


def strong_etag(media_type: str, *parts: JSON) -> str:
    """The ETag of what `parts` determine, as sent in this wire version and media type."""
    named = json.dumps([wire.WIRE_VERSION, media_type, *parts], sort_keys=True, separators=(",", ":"))
    return f'"{hashlib.sha256(named.encode()).hexdigest()[:40]}"'


def immutable_headers(etag: str) -> dict[str, str]:
    """The headers of an answer that will never be another one."""
    return {"etag": etag, "cache-control": IMMUTABLE, "vary": "accept"}


def not_modified(request: Request, etag: str) -> Response | None:
    """The 304 for a caller that says it has this already (RFC 9110, 13.1.2: a list of ETags, or `*`), else None."""
    held = {part.strip().removeprefix("W/") for part in ",".join(request.headers.getlist("if-none-match")).split(",")}
    return Response(status_code=304, headers=immutable_headers(etag)) if held & {etag, "*"} else None
