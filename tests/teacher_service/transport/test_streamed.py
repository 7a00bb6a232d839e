"""Streams whose client takes nothing, leaves, or is one too many."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from potstill.cache.errors import Overloaded
from potstill.teacher_service.access.auth import Caller, Role, caller
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.transport.streamed import ReadSlots, StreamedAnswer
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving
from tests.support.waiting import eventually, until

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
    """An app that streams the pieces, and at /seven answers from one of the threads."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/seven":
            await Response(await slots.threads.run(lambda: b"7"))(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await StreamedAnswer(iter(pieces), slots, headers={}, media_type=ARROW)(scope, receive, send)
            except BaseException as error:
                if type(error).__name__ != "ClientDisconnect":
                    raise

    return app


def test_a_client_that_takes_nothing_is_dropped() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=1.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url, http.stream("GET", url):
        until(lambda: pieces.read > 2 and slots.streams.in_use == 0)
        assert pieces.read < 50


def test_a_client_that_takes_nothing_holds_no_thread_meanwhile() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=600.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url, http.stream("GET", url):
        until(lambda: pieces.read > 2)
        # The one thread is free, though the answer is still under way.
        assert http.get(f"{url}/seven").content == b"7"
        assert slots.streams.in_use == 1


def test_a_client_that_leaves_stops_the_reading() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=600.0)
    pieces = CountedPieces()
    with serving(streaming(pieces, slots)) as url:
        with http.stream("GET", url):
            until(lambda: pieces.read > 2)
        until(lambda: slots.streams.in_use == 0)
        read = pieces.read
        time.sleep(0.2)
        assert pieces.read == read


class Connection:
    """One request's ASGI side: keeps what is sent, and leaves when it is told to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    async def take(self, pieces: Iterator[bytes], slots: ReadSlots) -> None:
        answer = StreamedAnswer(pieces, slots, headers={}, media_type=ARROW)
        await answer({"type": "http", "method": "GET"}, self.receive, self.send)


async def test_more_streams_than_there_are_places_are_turned_away() -> None:
    slots = ReadSlots(threads=1, streams=1, stall_seconds=60.0)
    connection = Connection()
    with slots.stream(), pytest.raises(Overloaded, match="max_streams"):
        await connection.take(iter([b"x"]), slots)
    assert connection.sent == []
    await connection.take(iter([b"x"]), slots)
    assert b"".join(message.get("body", b"") for message in connection.sent) == b"x"
    assert slots.streams.in_use == 0


async def test_a_key_leaves_a_share_of_the_places_to_others() -> None:
    slots = ReadSlots(threads=1, streams=16, stall_seconds=60.0)
    with ExitStack() as held:
        caller.set(Caller("ann", Role.TRAINER))
        for _ in range(14):
            held.enter_context(slots.stream())
        greedy = Connection()
        with pytest.raises(Overloaded, match="max_streams"):
            await greedy.take(iter([b"x"]), slots)
        caller.set(Caller("bob", Role.TRAINER))
        other = Connection()
        await other.take(iter([b"x"]), slots)
        assert (greedy.sent, other.sent[0]["status"]) == ([], 200)
        assert slots.streams.in_use == 14
    assert slots.streams.in_use == 0


async def test_a_client_that_leaves_in_the_middle_is_no_failure() -> None:
    slots, pieces = ReadSlots(threads=1, streams=1, stall_seconds=60.0), CountedPieces()
    connection = Connection()
    taking = asyncio.create_task(connection.take(iter(pieces), slots))
    await eventually(lambda: len(connection.sent) > 2)
    connection.left.set()
    await taking
    assert connection.sent[-1]["more_body"]
    assert slots.streams.in_use == 0


async def test_a_client_that_leaves_before_the_first_piece_gets_no_answer() -> None:
    slots, reading = ReadSlots(threads=1, streams=1, stall_seconds=60.0), threading.Event()

    def held_up() -> Iterator[bytes]:
        reading.wait()
        yield b"x"

    connection = Connection()
    taking = asyncio.create_task(connection.take(held_up(), slots))
    await eventually(lambda: slots.streams.in_use == 1)
    connection.left.set()
    with pytest.raises(ClientDisconnect):
        await taking
    reading.set()
    assert connection.sent == []
    assert slots.streams.in_use == 0


def test_a_service_counts_no_refusal_of_a_client_that_leaves_in_the_middle() -> None:
    slots, pieces = ReadSlots(threads=1, streams=1, stall_seconds=600.0), CountedPieces()
    service = Service([hosted("fake", FakeTeacher())])
    app = create_app(service)

    @app.get("/endless")
    async def endless() -> StreamedAnswer:
        return StreamedAnswer(iter(pieces), slots, headers={}, media_type=ARROW)

    with serving(app) as url:
        with http.stream("GET", f"{url}/endless"):
            until(lambda: pieces.read > 2)
        until(lambda: slots.streams.in_use == 0)
        until(
            lambda: service.metrics.value("potstill_requests_total", method="GET", route="/endless", status="200") == 1
        )
        assert service.metrics.num_refusals == 0
