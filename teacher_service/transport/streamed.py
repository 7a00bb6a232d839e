"""Answers that are read while they are sent: bounded in memory, in threads and in time.

Pieces of bytes come out of a blocking iterator, each read in one of a few threads while the one before is sent. A
failure before the first piece is answered as any error is; a later one breaks the connection, so that no client takes a
part for the whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from potstill.cache.errors import PotstillError
from potstill.teacher_service.access.auth import current_caller
from potstill.teacher_service.admission import SharedBound
from potstill.teacher_service.transport.turns import FairThreads

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class ReadSlots:
    """The threads that read the store, and the bound of answers streamed at one time, not all to one key."""

    def __init__(self, *, threads: int, streams: int, stall_seconds: float) -> None:
        self.threads = FairThreads(threads, "corpus-read")
        self.stall_seconds = stall_seconds
        """Seconds that a client may take nothing of what is sent to it."""
        self.streams = SharedBound(streams, "streamed answers (max_streams)", reason="streams", refusals=Counter())

    def stream(self) -> AbstractContextManager[None]:
        """Hold one of the current caller's streams; entering raises Overloaded when that key has none left."""
        return self.streams.hold(current_caller().name, 1)


class StreamedAnswer(Response):
    """Sends the pieces of an iterator; a HEAD request gets only status and headers, and nothing is read for it.

    When the client leaves, nothing more is read.

    Raises:
        Overloaded: too many are streamed already. What the iterator raises before its first piece.
        ClientDisconnect: the client left before anything was sent.
    """

    def __init__(
        self, pieces: Iterator[bytes], slots: ReadSlots, *, headers: Mapping[str, str], media_type: str
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        self._pieces = pieces
        self._slots = slots
        self._begun = False
        del self.headers["content-length"]  # of the empty body; the real one is not known yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer, or break it off."""
        if scope["method"] == "HEAD":
            await send(self._start())
            await send(_body(b"", more=False))
            return
        with self._slots.stream():
            try:
                await while_connected(receive, self._send(send))
            except ClientDisconnect:
                if not self._begun:  # later nobody could answer it any more, and it would count as our failure
                    raise

    async def _send(self, send: Send) -> None:
        piece = await self._read()
        self._begun = True
        await send(self._start())
        # An ASGI app breaks a connection off by returning before the last message.
        try:
            while piece is not None:
                reading = asyncio.ensure_future(self._read())
                try:
                    async with asyncio.timeout(self._slots.stall_seconds):
                        await send(_body(piece, more=True))
                    piece = await reading
                finally:
                    # A thread cannot be interrupted: its read ends by itself, and the piece is dropped.
                    reading.cancel()
        except PotstillError as error:
            _LOG.warning("an answer was broken off in the middle: %s: %s", error.kind, error.detail)
            return
        except TimeoutError:
            _LOG.warning("an answer was broken off: its client took nothing for %g s", self._slots.stall_seconds)
            return
        await send(_body(b"", more=False))

    async def _read(self) -> bytes | None:
        return await self._slots.threads.run(lambda: next(self._pieces, None))

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


def _body(piece: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, or cancel it when the client leaves and nobody would read the answer. The body must be read.

    Raises:
        ClientDisconnect: the client left. What the work raises.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        # Awaited, so that the request's slots and rows are given back before it counts as over.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
