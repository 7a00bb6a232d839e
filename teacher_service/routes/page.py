"""The page at `/`: static files, which get their data from `/v1/overview`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

from fastapi import FastAPI, Request, Response

from potstill.cache.errors import NotFound

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asked again each time, and answered with 304: a newer service is never shown through an older page.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def add_page_routes(app: FastAPI) -> None:
    """Add the routes to the app. The files hold no data, so they need no key."""
    folder = resources.files("potstill.teacher_service") / "static"
    files = {entry.name: _file(entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(files["index.html"], request)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        if name not in files:
            raise NotFound(f"there is no file {name[:64]!r}; the page is at /")
        return _answer(files[name], request)


def _answer(file: _File, request: Request) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _file(name: str, content: bytes) -> _File:
    # The system's own table may name any type for .js; a wrong one would stop a browser that must not sniff.
    known = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    return _File(content, known[PurePath(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
