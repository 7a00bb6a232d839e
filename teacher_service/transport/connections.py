"""Bounds of connections, in number and slowness, before there is a request that could have a key."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from potstill.cache.errors import Unavailable
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport.heads import BoundedHeads, refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ABORT = "potstill.abort"
"""Name of our ASGI extension: a callable that drops the connection at once, with all that its client has not taken."""


def bounded_protocol(limits: LimitSettings) -> type[asyncio.Protocol]:
    """Make the `http` protocol of a `uvicorn.Config`, which bounds connections in all and per address.

    A whole request head has to arrive within `body_seconds`, from the connection's begin or from the first byte of a
    later head; between requests uvicorn's own keep-alive timeout counts. A closing connection is dropped when its
    client has not taken the rest within about `body_seconds`.
    """

    class Connection(_BoundedConnection):
        max_connections = limits.max_connections
        max_per_origin = limits.max_connections_per_address
        of_origin: ClassVar[Counter[str]] = Counter()  # of this server: uvicorn makes an object per connection
        seconds = limits.body_seconds

    return Connection


class _BoundedConnection(BoundedHeads):
    max_connections: int
    max_per_origin: int
    of_origin: ClassVar[Counter[str]]
    seconds: float
    app: Any

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app = _with_abort(self.app, transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._lost = False
        self._watch = self.loop.call_later(self.seconds, self._check_closing)
        self._origin = _origin(transport.get_extra_info("peername"))
        self.of_origin[self._origin] += 1
        over = self._over()
        if over:
            transport.write(refusal(Unavailable.status, "Service Unavailable", Unavailable(f"{over}; retry later")))
            transport.close()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._watch.cancel()
        self._expect_head()
        self.of_origin[self._origin] -= 1
        if not self.of_origin[self._origin]:
            del self.of_origin[self._origin]
        super().connection_lost(exc)

    def _over(self) -> str:
        """The bound that this connection exceeds, in words; empty for none."""
        if len(self.connections) > self.max_connections:
            return f"max_connections={self.max_connections} are open"
        if self._origin and 0 < self.max_per_origin < self.of_origin[self._origin]:
            return f"max_connections_per_address={self.max_per_origin} are open from {self._origin}"
        return ""

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


def _origin(peer: Any) -> str:
    """The client's address, of IPv6 its /64 network, which one client usually has whole; empty for a Unix socket."""
    if not isinstance(peer, tuple):
        return ""  # a Unix socket
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
