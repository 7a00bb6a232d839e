"""Streams whose client takes nothing, leaves, or is one too many."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from teacher_service.streamed import ReadSlots, StreamedAnswer
from tests.servers import serving
from tests.waiting import until

ARROW = "application/vnd.apache.arrow.stream"


class CountedPieces:
    """Pieces of 1 MiB without end; counts those that were read."""

    def __init__(self) -> None:
        self.read = 0
        self.lock = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self.lock:
            self.read += 1
        return bytes(1 << 20)


def streaming(pieces: CountedPieces, slots: ReadSlots) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await StreamedAnswer(iter(pieces), slots, headers={}, media_type=ARROW)(scope, receive, send)
            except BaseException as error:
                if type(error).__name__ != "ClientDisconnect":
                    raise

    return app


def test_a_client_that_takes_nothing_is_dropped() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=1.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url, httpx.stream("GET", url):
        until(lambda: pieces.read > 2 and slots.in_use == 0)
        assert pieces.read < 50


def test_a_client_that_takes_nothing_holds_no_thread_meanwhile() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=600.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url, httpx.stream("GET", url):
        until(lambda: pieces.read > 2)
        # The one thread is free, though the answer is still under way.
        assert slots.pool.submit(lambda: 7).result(timeout=60) == 7
        assert slots.in_use == 1


def test_a_client_that_leaves_stops_the_reading() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=600.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url:
        with httpx.stream("GET", url):
            until(lambda: pieces.read > 2)
        until(lambda: slots.in_use == 0)
        read = pieces.read
        time.sleep(0.2)
        assert pieces.read == read


async def test_more_streams_than_there_are_places_are_turned_away() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=60.0)
    slots.take()
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    answer = StreamedAnswer(iter([b"x"]), slots, headers={}, media_type=ARROW)
    with pytest.raises(Exception, match="max_streams"):
        await answer({"type": "http", "method": "GET"}, receive, send)
    assert sent == []
    slots.in_use -= 1
    await answer({"type": "http", "method": "GET"}, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"x"
    assert slots.in_use == 0
