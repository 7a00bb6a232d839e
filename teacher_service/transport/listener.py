"""The listening socket, which bounds connections when they are accepted: in TLS that is before the handshake."""

from __future__ import annotations

import ipaddress
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from potstill.cache.errors import InvalidInput, Unavailable
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport.heads import refusal

_LOG = logging.getLogger(__name__)
_OTHER_FILES = 256  # of the cache, the engines and the log


def allow_files(limits: LimitSettings) -> None:
    """Raise this process's limit of open files to what `max_connections` needs.

    Raises:
        InvalidInput: the system does not allow it.
    """
    needed = limits.max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or needed <= hard:
        if soft != resource.RLIM_INFINITY and soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise InvalidInput(
        f"max_connections={limits.max_connections} needs {needed} open files, and this process may have {hard}; "
        f"raise the limit (ulimit -Hn {needed}) or lower max_connections"
    )


class BoundedListener(socket.socket):
    """Accepts connections while they are within the bounds, in all and per address, and closes the others.

    Works with asyncio's own event loop: uvloop accepts past Python.
    """

    def __init__(self, listener: socket.socket, limits: LimitSettings, *, tls: bool = False) -> None:
        super().__init__(listener.family, listener.type, listener.proto, listener.detach())
        # For the connections, too. asyncio does it for sockets that name their protocol, as these do not: a body would
        # wait for the client's receipt of the head, which the kernel holds back for 40 ms.
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limits = limits
        self._tls = tls
        self._open: Counter[str] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, which counts until it is closed.

        Raises:
            ConnectionAbortedError: it was over a bound and has been closed. BlockingIOError: there is none.
        """
        accepted, address = super().accept()
        origin = _origin(address)
        over = self._over(origin)
        if not over:
            self._open[origin] += 1
            return _Counted(accepted, lambda: self._forget(origin)), address
        # Seldom written out, as logs.configure sets it up: callers without a key must not be able to fill the disk.
        _LOG.warning("connections are refused: %s", over)
        with accepted, suppress(OSError):
            accepted.settimeout(0)  # a first answer fits into the kernel's buffer
            if not self._tls:
                error = Unavailable(f"{over}; retry later")
                accepted.send(refusal(Unavailable.status, "Service Unavailable", error))
        raise ConnectionAbortedError(over)

    def _over(self, origin: str) -> str:
        """The bound that one more connection exceeds, in words; empty for none."""
        most, of_origin = self._limits.max_connections, self._limits.max_connections_per_address
        if self._open.total() >= most:
            return f"max_connections={most} are open"
        if origin and 0 < of_origin <= self._open[origin]:
            return f"max_connections_per_address={of_origin} are open from {origin}"
        return ""

    def _forget(self, origin: str) -> None:
        self._open[origin] -= 1
        if not self._open[origin]:
            del self._open[origin]


class _Counted(socket.socket):
    """A connection that tells when it is closed."""

    def __init__(self, accepted: socket.socket, closed: Callable[[], None]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._tell: Callable[[], None] | None = closed

    def close(self) -> None:
        super().close()
        if self._tell is not None:
            self._tell()
            self._tell = None


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
