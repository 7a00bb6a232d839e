"""An HTTP proxy on a loopback port that passes requests on to a real server, or fails them as it is told."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["500", "503", "drop before", "drop after", "truncate", "delay"]
"""Before: the request is never carried out. After: it is, and only its answer is lost. Truncate: half a body."""

FAULTS: tuple[Fault, ...] = ("500", "503", "drop before", "drop after", "truncate", "delay")
DELAY_SECONDS = 0.1

Choose = Callable[[str, str], Fault | None]
"""Chooses the fault that a request meets, by its method and target."""

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


def no_faults(method: str, target: str) -> Fault | None:
    return None


def random_faults(seed: int, rate: float, *, kinds: tuple[Fault, ...] = FAULTS) -> Choose:
    rng = random.Random(seed)
    return lambda _method, _target: rng.choice(kinds) if rng.random() < rate else None


@dataclass
class FaultyProxy:
    """Set `choose` at any moment; `met` counts the faults that were injected."""

    upstream: str
    choose: Choose = no_faults
    drop_header: str = ""
    """A request header that does not get through, as with a server that does not know it."""
    met: Counter[str] = field(default_factory=Counter)
    endpoint: str = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection: the server closes it, so that every request can meet its own fault."""
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head, body = await _read_request(reader)
                method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
                fault = self.choose(method, target)
                if fault is not None:
                    self.met[fault] += 1
                reply = await self._reply(fault, head, body)
                writer.write(reply)
                await writer.drain()
        finally:
            writer.close()  # also when the proxy is stopped meanwhile
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def _reply(self, fault: Fault | None, head: bytes, body: bytes) -> bytes:
        if fault in ("500", "503"):
            return (
                f"HTTP/1.1 {fault} Fault\r\nContent-Length: {len(_SLOW_DOWN)}\r\nConnection: close\r\n\r\n".encode()
                + (b"" if head.startswith(b"HEAD") else _SLOW_DOWN)
            )
        if fault == "drop before":
            return b""
        if fault == "delay":
            await asyncio.sleep(DELAY_SECONDS)
        reply = await self._forward(head, body)
        if fault == "drop after":
            return b""
        if fault == "truncate":
            start = reply.index(b"\r\n\r\n") + 4
            return reply[: start + (len(reply) - start) // 2]
        return reply

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        url = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        dropped = f"connection|{self.drop_header}" if self.drop_header else "connection"
        closing = re.sub(rf"(?i)\r\n({dropped}):[^\r]*".encode(), b"", head)[:-2] + b"Connection: close\r\n\r\n"
        try:
            writer.write(closing + body)
            await writer.drain()
            reply = await reader.read(-1)
        finally:
            writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return reply


async def _read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return head, await reader.readexactly(int(length.group(1))) if length else b""


@contextmanager
def faulty_proxy(upstream: str, choose: Choose = no_faults) -> Iterator[FaultyProxy]:
    """Run a proxy in a thread of this process; its `endpoint` is what clients are given."""
    proxy = FaultyProxy(upstream, choose)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.answer, "127.0.0.1", 0, limit=1 << 20))
    proxy.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
