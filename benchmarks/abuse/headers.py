"""Requests whose head does not end, and chunked bodies whose trailers do not."""

from __future__ import annotations

import contextlib

from benchmarks.abuse.attack import Attack, Door

HEADERS_BYTES = 64 * 2**20
TRAILERS_BYTES = 48 * 2**20
_BLOCK = b"a:\r\n" * 16_384


def endless_headers(door: Door) -> None:
    """Send 64 MiB of headers in one request; needs no key."""
    _send(door, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n", HEADERS_BYTES)


def endless_trailers(door: Door) -> None:
    """Send 48 MiB of trailers after a chunked body; needs no key."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    _send(door, head, TRAILERS_BYTES)


def _send(door: Door, head: bytes, num_bytes: int) -> None:
    with contextlib.suppress(OSError), door.connect() as connection:
        connection.sendall(head)
        for _ in range(num_bytes // len(_BLOCK)):
            connection.sendall(_BLOCK)


ATTACKS = (
    Attack(3, "64 MiB of headers", endless_headers),
    Attack(3, "48 MiB of trailers", endless_trailers),
)
