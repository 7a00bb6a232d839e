"""`POST /v1/teachers/{name}/score`: rows in, targets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Fields, Targets, TeacherIdentity, Tokens
from potstill.cache.wire import scores as wire
from potstill.teacher_service.access.auth import Role, allow
from potstill.teacher_service.admission.admission import Reservation, within
from potstill.teacher_service.admission.limits import (
    answer_format,
    check_request,
    read_body,
    request_format,
    timeout_seconds,
)
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.routes.answers import targets_response
from potstill.teacher_service.routes.corpora.bodies import same_wire
from potstill.teacher_service.transport.bounded_transfers import held_until_answered

T = TypeVar("T")
_SMALL_BYTES = 64 * 2**10  # (de)serialised on the event loop: less than a millisecond


class ScoreCall(Protocol):
    """A request body that was understood: whose rows are to be scored for what, and how that is answered."""

    @property
    def teacher(self) -> HostedTeacher:
        """Who is asked."""
        ...

    @property
    def rows(self) -> list[Tokens]:
        """Each [T] token ids."""
        ...

    @property
    def fields(self) -> Fields:
        """Of every row."""
        ...

    def answer(self, identity: TeacherIdentity, targets: list[Targets]) -> Response:
        """The targets of `rows` as the caller wants them."""
        ...


def add_score_routes(app: FastAPI, service: Service) -> None:
    """Add the route to the app."""

    @app.post("/v1/teachers/{name}/score", dependencies=[Depends(allow(Role.TRAINER)), Depends(same_wire)])
    async def score(name: str, request: Request) -> Response:
        teacher = service.teacher(name)
        reads = request_format(request)
        writes = answer_format(request, reads)
        _ = teacher.pool  # Unavailable while it starts, before a body is read
        decode = _from_json if reads == wire.JSON_MEDIA_TYPE else wire.request_from_arrow

        def understand(body: bytes) -> ScoreCall:
            asked = decode(body)
            return _PlainCall(teacher, asked.rows, asked.fields, writes)

        return await answer_call(service, request, understand)


async def answer_call(service: Service, request: Request, understand: Callable[[bytes], ScoreCall]) -> Response:
    """Read a body, score what it asks for and answer: within every limit, the caller's deadline and while it is there.

    Raises:
        PotstillError: whatever the body, the limits or the teacher give reason for.
        ClientDisconnect: the client left; its rows were taken out of the engine.
    """
    with service.admission.request() as reservation:
        return await _while_connected(request, await _prepare(service, request, understand, reservation))


async def _prepare(
    service: Service, request: Request, understand: Callable[[bytes], ScoreCall], reservation: Reservation
) -> Coroutine[Any, Any, Response]:
    """Check and read everything that needs no teacher; the coroutine does the rest."""
    begin = asyncio.get_running_loop().time()
    seconds = timeout_seconds(request)
    store = "no-store" not in request.headers.get("cache-control", "").lower()
    body = await read_body(request)

    async def finish() -> Response:
        call = await _off_loop(len(body), lambda: understand(body))
        front = call.teacher.front(store=store)
        num_tokens = check_request(call.rows, call.fields, teacher=front, limits=service.limits)
        size = num_tokens * call.fields.bytes_per_position(front.identity.vocab_size)
        reservation.hold_answer(size)
        held_until_answered(request).callback(reservation.release_answer)
        with service.metrics.scoring(call.teacher.name, rows=len(call.rows), tokens=num_tokens):
            targets = await within(seconds, begin, front.score(call.rows, call.fields, before_waiting=reservation.wait))
        return await _off_loop(size, lambda: call.answer(front.identity, targets))

    return finish()


@dataclass(frozen=True, slots=True)
class _PlainCall:
    teacher: HostedTeacher
    rows: list[Tokens]
    fields: Fields
    writes: str

    def answer(self, identity: TeacherIdentity, targets: list[Targets]) -> Response:
        return targets_response(wire.ScoreAnswer(identity, targets), self.fields, self.writes)


def _from_json(body: bytes) -> wire.ScoreRequest:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    return wire.request_from_json(value)


async def _off_loop(num_bytes: int, call: Callable[[], T]) -> T:
    return call() if num_bytes < _SMALL_BYTES else await asyncio.to_thread(call)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or cancel it when the client leaves: nobody would read the answer."""
    working = asyncio.create_task(work)
    # The body is read, so the next message says that the client left.
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
