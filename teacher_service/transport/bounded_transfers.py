"""ASGI middleware that bounds bodies and answers of every route: in size, in time, and all together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from potstill.cache.errors import BodyTooLarge, PotstillError, RequestTimeout
from potstill.teacher_service.access.auth import current_caller
from potstill.teacher_service.access.middleware import READS, route_of
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.transport.connections import ABORT
from potstill.teacher_service.transport.streamed import disconnected

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOG = logging.getLogger(__name__)
_SLICE_BYTES = 256 * 2**10  # large enough that slicing costs nothing, small enough for a slow client's `body_seconds`
# A body of settings becomes Python objects before any of them is checked, and an error for each that is wrong.
_MOST_SETTINGS = ("the 64 KiB that settings may have", 64 * 2**10)
SHORT_ANSWER_BYTES = 64 * 2**10
"""Most bytes of a whole answer that is not counted."""
ANSWER_IS_COUNTED = "answer_is_counted"
"""Key in the state of a request whose route has counted its answer."""
_HELD = "held_until_answered"


def held_until_answered(request: Request) -> ExitStack:
    """The stack that is closed once the request's answer is sent or given up; push releases of resources to it."""
    held: ExitStack = request.scope["state"][_HELD]
    return held


class BoundedTransfers:
    """Refuses bodies that are too long, too slow or too many together; gives up clients that do not take their answers.

    A body counts against `max_body_bytes_in_flight` until its request is answered. Its time begins with the first read,
    so that a request that has to wait before that is not blamed. A whole answer of over `SHORT_ANSWER_BYTES` counts
    against `max_answer_bytes_in_flight` until it is sent; routes that stream, or hold arrays, count theirs themselves.
    Answers go out in slices, each once the client took most of the one before: bytes that are not taken yet stay
    counted, and the server's buffers stay small. For a client that is given up no more is computed, and its connection
    is dropped.
    """

    def __init__(
        self, app: ASGIApp, admission: Admission, answer_error: Callable[[Request, PotstillError], Response]
    ) -> None:
        self._app = app
        self._answer_error = answer_error
        self._admission = admission
        # A body over the bound of all together would be told to come back later for ever.
        name, most = admission.limits.smallest("max_body_bytes", "max_body_bytes_in_flight")
        self._most = (f"{name}={most}; send fewer rows per request", most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            scope.setdefault("state", {})[_HELD] = held
            most = _MOST_SETTINGS if _takes_settings(scope) else self._most
            body = _Body(self._admission, most, receive)
            held.callback(body.release)
            answer = _Answer(self._admission, held, scope["state"], send)
            try:
                await self._app(scope, body.receive, answer.send)
            except _Refused as refused:
                await self._answer_error(Request(scope), refused.error)(scope, receive, send)
            except _GivenUp:
                await _drop(scope, receive)


def _takes_settings(scope: Scope) -> bool:
    """True where FastAPI reads the body into a model; other routes read theirs by themselves."""
    route = None if scope["method"] in READS else route_of(scope)
    return route is not None and route.body_field is not None


class _Body:
    """One request's body while it is read."""

    def __init__(self, admission: Admission, most: tuple[str, int], receive: Receive) -> None:
        self._limits = admission.limits
        self._most = most
        self._bound = admission.bodies
        self._receive = receive
        self._key = current_caller().name
        self._held = 0
        self._ends: float | None = None
        self._complete = False

    async def receive(self) -> Message:
        """Receive the next message.

        Raises:
            BodyTooLarge, RequestTimeout, Overloaded: see `BoundedTransfers`.
        """
        if self._complete:
            return await self._receive()  # waits for the client to leave, as long as it takes
        message = await self._in_time()
        if message["type"] == "http.request":
            self._hold(len(message.get("body", b"")))
            self._complete = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Give back the body's bytes at the end of its request."""
        self._bound.give_back(self._key, self._held)
        self._held = 0

    async def _in_time(self) -> Message:
        seconds = self._limits.body_seconds
        self._ends = self._ends or asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(self._ends) as limit:
                return await self._receive()
        except TimeoutError as error:
            if not limit.expired():
                raise  # a timeout from further inside, which is none of ours
            raise RequestTimeout(
                f"{self._held} bytes of the body came within body_seconds={seconds:g}, and not its end; "
                "send fewer rows per request"
            ) from error

    def _hold(self, num_bytes: int) -> None:
        limit, most = self._most
        if self._held + num_bytes > most:
            raise BodyTooLarge(f"the body is over {limit}")
        self._bound.take(self._key, num_bytes, own=self._held)
        self._held += num_bytes


class _Answer:
    """One request's answer while it is sent: counted where it is whole and long, and passed on in slices."""

    def __init__(self, admission: Admission, held: ExitStack, state: MutableMapping[str, Any], send: Send) -> None:
        self._admission = admission
        self._held = held
        self._state = state
        self._send = send
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        """Send the next message.

        Raises:
            _Refused: the answer would be over the bound of all; nothing of it is sent yet.
            _GivenUp: the client does not take it.
        """
        if message["type"] == "http.response.start":
            self._start = message  # sent with the body, which may be refused before it
            return
        body = message.get("body", b"")
        if self._start is not None:
            if not message.get("more_body", False):
                self._count(len(body))
            start, self._start = self._start, None
            await self._in_time(start)
        for at in range(0, max(len(body), 1), _SLICE_BYTES):
            more = at + _SLICE_BYTES < len(body) or message.get("more_body", False)
            await self._in_time({**message, "body": bytes(body[at : at + _SLICE_BYTES]), "more_body": more})

    def _count(self, num_bytes: int) -> None:
        # Errors and probes have to get through when the bound is reached: connections bound what is short.
        if num_bytes <= SHORT_ANSWER_BYTES or ANSWER_IS_COUNTED in self._state:
            return
        try:
            self._held.enter_context(self._admission.answer(num_bytes + _SLICE_BYTES))
        except PotstillError as error:
            raise _Refused(error) from error

    async def _in_time(self, message: Message) -> None:
        seconds = self._admission.limits.body_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                await self._send(message)
        except TimeoutError as error:
            if not limit.expired():
                raise
            _LOG.warning("a client took nothing of its answer for %g seconds and is given up", seconds)
            raise _GivenUp from error


class _Refused(Exception):
    """There is no room for an answer. Like `_GivenUp` it passes through the app."""

    def __init__(self, error: PotstillError) -> None:
        super().__init__(error)
        self.error = error


class _GivenUp(Exception):
    """The client does not take its answer. No handler of the app knows this class, so it passes through the app."""


async def _drop(scope: Scope, receive: Receive) -> None:
    """Drop the connection, and return once the server knows."""
    # Before that, returning with the answer unfinished would look like a bug of the app's to the server.
    abort = scope.get("extensions", {}).get(ABORT)
    if abort is None:
        return  # another server, which closes a connection whose answer is not complete
    abort()
    await disconnected(receive)
