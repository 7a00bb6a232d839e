"""ASGI middleware that finds each request's caller, refuses unknown ones, and writes admin actions to the audit log.

A request without a known key ends before its body is read, except on the few open paths. The role that a route needs is
declared by the route itself (`auth.allow`).
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from potstill.cache.errors import PotstillError, Unauthenticated
from potstill.cache.types import JSON
from potstill.teacher_service.access.audit import DETAIL_BYTES, Audit, AuditLine, detail_of
from potstill.teacher_service.access.auth import EVERYBODY, Caller, Role, allow, caller
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.sites import require_host, require_same_site
from potstill.teacher_service.settings import AccessSettings
from potstill.teacher_service.telemetry.logs import access_record, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/", "/health", "/healthz", "/readyz"})
"""Paths that are answered without a key, like everything under `/static/`: health checks, and the page that asks for a
key."""

READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
_FOUND_ROUTE = "potstill.route"  # key in the scope
_LONGEST_TARGET = 300
_CLIENT_LEFT = 499  # nginx's status for a client that did not wait for its answer
_UNKNOWN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Access:
    """The keys, the audit log and the open paths of one service."""

    keys: KeyRing | None = None
    """The API keys; with None everybody may do everything, which only a loopback address allows."""
    audit: Audit = field(default_factory=Audit)
    open_paths: frozenset[str] = OPEN_PATHS
    hosts: frozenset[str] = frozenset()
    """Names in a request's `Host`, beside loopback ones; with keys and without names any host is right."""

    @classmethod
    def of(cls, settings: AccessSettings) -> Access:
        """Open the files that the settings name.

        Raises:
            InvalidInput: the keys cannot be read, or the audit file not be written.
        """
        keys = None if settings.keys_file is None else KeyRing(Path(settings.keys_file))
        audit = Audit(None if settings.audit_file is None else Path(settings.audit_file))
        open_paths = OPEN_PATHS | {"/metrics"} if settings.open_metrics else OPEN_PATHS
        return cls(keys, audit, open_paths, frozenset(map(str.lower, settings.hosts)))

    @property
    def failed(self) -> bool:
        """True while there are keys that cannot be read, so that no caller is known."""
        return self.keys is not None and self.keys.failed

    def is_open(self, path: str) -> bool:
        """True where a path is answered without a key."""
        return path in self.open_paths or path.startswith("/static/")

    def check_sender(self, headers: Headers) -> None:
        """Refuse what a web page of another site has a browser send.

        Raises:
            Forbidden: `Host`, `Sec-Fetch-Site` or `Origin` is another site's.
        """
        # With keys the host may be free: a browser adds no key to what another site's page sends.
        if self.keys is None or self.hosts:
            require_host(headers, self.hosts)
        require_same_site(headers)

    def identify(self, headers: Headers) -> Caller:
        """Find the caller of a request by its headers.

        Raises:
            Unauthenticated: no key, or an unknown one. Unavailable: the keys cannot be read now.
        """
        if self.keys is None:
            return EVERYBODY
        key = _key_of(headers.get("authorization", ""))
        if not key:
            raise Unauthenticated("this needs an API key; send the header Authorization: Bearer KEY")
        found = self.keys.find(key)
        if found is None:
            raise Unauthenticated("this API key is not known; ask an admin of the service for one")
        return found


def _key_of(authorization: str) -> str:
    """The key of `Bearer KEY`, or the password of `Basic`; empty when there is none.

    Trainers that can be given only a URL send the second form: `http://any:KEY@host:port`.
    """
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode("ascii").partition(":")[2].strip()
    except ValueError:
        return ""


class AccessApp:
    """Puts the caller into the context of each request, or refuses it.

    Args:
        app: the application behind.
        access: keys, audit log and open paths.
        answer_error: makes, and counts, the answer of a refusal.
    """

    def __init__(
        self, app: ASGIApp, access: Access, answer_error: Callable[[Request, PotstillError], Response]
    ) -> None:
        self._app = app
        self._access = access
        self._answer_error = answer_error
        self._unknown_told = -_UNKNOWN_SECONDS
        self._unknown_left_out = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, is_open = Headers(scope=scope), self._access.is_open(scope["path"])
        try:
            if not is_open:
                self._access.check_sender(headers)
            who = self._access.identify(headers)
        except PotstillError as error:
            if not is_open:
                if _is_admin_action(scope):
                    await self._record_unknown(error, scope)
                await self._answer_error(Request(scope), error)(scope, receive, send)
                return
            who = Caller("", Role.TRAINER)  # sees what is open, and no more than a trainer would
        caller.set(who)
        access_record().caller = who.name
        if _is_admin_action(scope):
            await _Audited(self._access.audit, scope, receive, send, who).serve(self._app)
        else:
            await self._app(scope, receive, send)

    async def _record_unknown(self, error: PotstillError, scope: Scope) -> None:
        """Write at most one line a second: callers without a key must not be able to fill the disk."""
        if time.monotonic() - self._unknown_told < _UNKNOWN_SECONDS:
            self._unknown_left_out += 1
            return
        self._unknown_told = time.monotonic()
        detail: JSON = {"error": error.detail, "left_out": self._unknown_left_out}
        self._unknown_left_out = 0
        await self._access.audit.record(_line(scope, "", error.status, detail))


class _Audited:
    """One admin action, allowed or refused, recorded before its answer begins."""

    def __init__(self, audit: Audit, scope: Scope, receive: Receive, send: Send, who: Caller) -> None:
        self._audit = audit
        self._scope = scope
        self._receive = receive
        self._send = send
        self._who = who
        self._body = b""
        self._recorded = False

    async def serve(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._receiving, self._sending)
        except asyncio.CancelledError:
            # As by a shutdown that does not wait any longer. The action may have been done, so it is recorded.
            await self._record(_CLIENT_LEFT)
            raise
        except Exception:
            # Answered outside of this middleware, so that `_sending` does not see the 500.
            await self._record(500)
            raise
        if not self._recorded:
            await self._record(_CLIENT_LEFT)

    async def _receiving(self) -> Message:
        message = await self._receive()
        # Kept until it is too long to be told: no more is needed to know that it is.
        if message["type"] == "http.request" and len(self._body) <= DETAIL_BYTES:
            self._body += message.get("body", b"")
        return message

    async def _sending(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._record(message["status"])
        await self._send(message)

    async def _record(self, status: int) -> None:
        if not self._recorded:
            self._recorded = True  # before the await: cancelled there, `serve` would record it again
            await self._audit.record(_line(self._scope, self._who.name, status, detail_of(self._body)))


def _line(scope: Scope, caller: str, status: int, detail: JSON) -> AuditLine:
    route = route_of(scope)
    return AuditLine(
        caller=caller,
        action=f"{scope['method']} {route.path if route is not None else ''}",
        target=scope["path"][:_LONGEST_TARGET],
        detail=detail,
        status=status,
        request_id=request_id.get(),
    )


def _is_admin_action(scope: Scope) -> bool:
    """True where the request would change something that only admins may change."""
    route = None if scope["method"] in READS else route_of(scope)
    needed = [] if route is None else [declared.dependency for declared in route.dependencies]
    return any(isinstance(role, allow) and role.role is Role.ADMIN for role in needed)


def route_of(scope: Scope) -> APIRoute | None:
    """The route that will answer. Looked up here because the router does so only after this middleware."""
    # Once a request: several layers ask, and each route that does not match costs a search of its pattern.
    if _FOUND_ROUTE not in scope:
        routes = (route for route in scope["app"].routes if isinstance(route, APIRoute))
        scope[_FOUND_ROUTE] = next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)
    found: APIRoute | None = scope[_FOUND_ROUTE]
    return found
