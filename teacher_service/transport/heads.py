"""Bounds of what a connection may send that is neither a request's body nor kept for long: heads and trailers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from potstill.cache.errors import LimitExceeded, PotstillError

if TYPE_CHECKING:
    import asyncio

HEAD_BYTES = 64 * 2**10
"""Most bytes of a request's head, of its trailers, and of the line before a chunk."""
HEAD_FIELDS = 256
"""Most fields of a head or of trailers: in memory each takes far more than its bytes."""
_PIPELINED = 4  # requests that may come before the one in front is answered; clients in use send none
_PIECE_BYTES = 16 * 2**10
# Which of uvicorn's two implementations it is depends on what is installed; both have what is used here.
_Protocol: Any = AutoHTTPProtocol
_HTTPTOOLS = hasattr(AutoHTTPProtocol, "on_body")  # the other is h11, which has the bound of bytes itself


class BoundedHeads(_Protocol):  # type: ignore[misc]
    """Refuses a head or trailers over `HEAD_BYTES` or `HEAD_FIELDS`, and closes the connection."""

    _since_progress = 0
    _in_head = True
    transport: asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Parse what came, in pieces, so that little more is parsed than the bound."""
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self._since_progress += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._is_over():
                self._refuse()
                return

    def on_message_begin(self) -> None:
        """Begin a head; called by httptools like those below."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Serve the request whose head is there."""
        self._since_progress = 0
        if len(self.headers) > HEAD_FIELDS:
            self._refuse()  # before anything of it is served
        self._in_head = False
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, which has bounds of its own."""
        self._since_progress = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request's body."""
        self._since_progress = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def _is_over(self) -> bool:
        if len(self.headers or ()) > HEAD_FIELDS:
            return True
        return _HTTPTOOLS and (self._since_progress > HEAD_BYTES or len(self.pipeline) > _PIPELINED)

    def _refuse(self) -> None:
        if not self._in_head or (self.cycle is not None and not self.cycle.response_complete):
            self.transport.abort()  # a request that came before has its answer, or may have begun to get it
            return
        detail = f"a request's head is over {HEAD_BYTES} bytes or {HEAD_FIELDS} fields"
        self.transport.write(refusal(431, "Request Header Fields Too Large", LimitExceeded(detail)))
        self.transport.close()


def refusal(status: int, reason: str, error: PotstillError) -> bytes:
    """The whole answer that ends a connection. Made by hand, as there is no request yet that an app could answer."""
    body = json.dumps({"kind": error.kind, "detail": error.detail}).encode()
    retry = "retry-after: 1\r\n" if error.retryable else ""
    head = (
        f"HTTP/1.1 {status} {reason}\r\n{retry}connection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
