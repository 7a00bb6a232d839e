"""The server, with bounds of how slow a connection may be before there is a request that could have a key."""

from __future__ import annotations

import asyncio
from functools import partial
from socket import socket
from typing import TYPE_CHECKING, Any

import uvicorn

from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport.heads import HEAD_BYTES, BoundedHeads

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ABORT = "potstill.abort"
"""Name of our ASGI extension: a callable that drops the connection at once, with all that its client has not taken."""
_HANDSHAKE_SECONDS = 5.0  # of TLS: asyncio gives 60


class BoundedServer(uvicorn.Server):
    """Serves an app, without websockets.

    TLS has to be agreed on within five seconds. A whole request head has to arrive within `body_seconds`, from the
    connection's begin or from the first byte of a later head; between requests uvicorn's own keep-alive timeout counts.
    A closing connection is dropped when its client has not taken the rest within about `body_seconds`.

    Args:
        app: the ASGI app.
        limits: has `body_seconds`.
        options: others of `uvicorn.Config`.
    """

    def __init__(self, app: ASGIApp, limits: LimitSettings, **options: Any) -> None:
        class Connection(_TimedConnection):
            seconds = limits.body_seconds

        self._handshake_seconds = min(_HANDSHAKE_SECONDS, limits.body_seconds)
        options |= {"http": Connection, "h11_max_incomplete_event_size": HEAD_BYTES, "ws": "none", "log_config": None}
        super().__init__(uvicorn.Config(app, access_log=False, **options))

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to serve on these sockets; like uvicorn's own, which does not bound the handshake."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        config, tls = self.config, self.config.ssl
        made: dict[str, Any] = {"server_state": self.server_state, "app_state": self.lifespan.state}
        protocol_class: Any = config.http_protocol_class
        protocol = partial(protocol_class, config=config, **made)
        seconds = None if tls is None else self._handshake_seconds
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                protocol, sock=each, ssl=tls, ssl_handshake_timeout=seconds, backlog=config.backlog
            )
            for each in sockets or ()
        ]
        self.started = True


class _TimedConnection(BoundedHeads):
    seconds: float
    app: Any

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app = _with_abort(self.app, transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._lost = False
        self._watch = self.loop.call_later(self.seconds, self._check_closing)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._watch.cancel()
        self._expect_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """Have the timer run exactly while a head is to come."""
        served = self.cycle is not None and not self.cycle.response_complete
        if self._lost or served:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _check_closing(self) -> None:
        # uvicorn closes politely and waits for the client. Seen closing at two looks in a row is long enough.
        if self._closing:
            self.transport.abort()
            return
        self._closing = self.transport.is_closing()
        self._watch = self.loop.call_later(self.seconds, self._check_closing)


def _with_abort(app: ASGIApp, transport: asyncio.Transport) -> ASGIApp:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        extensions = {**(scope.get("extensions") or {}), ABORT: transport.abort}
        await app({**scope, "extensions": extensions}, receive, send)

    return serve
