"""`POST /v1/teachers/{name}/score`: rows in, targets out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from potstill.cache.types import Fields, Targets, TeacherIdentity, Tokens
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import PIECE_BYTES, in_pieces
from potstill.teacher_service.access import Role, allow
from potstill.teacher_service.admission.admission import within
from potstill.teacher_service.admission.limits import (
    answer_format,
    check_request,
    read_body,
    request_format,
    rows_of_tokens,
    same_wire,
    timeout_seconds,
)
from potstill.teacher_service.hosting import HostedTeacher, Service
from potstill.teacher_service.routes.corpora.targets_json import json_pieces
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport.bounded_transfers import ANSWER_IS_COUNTED, held_until_answered
from potstill.teacher_service.transport.streamed import while_connected

_WHOLE_BYTES = {wire.ARROW_MEDIA_TYPE: 64 * 2**10, wire.JSON_MEDIA_TYPE: 8 * 2**10}
"""Bytes of arrays up to which an answer is sent whole, as text several times that; a longer one is written while it is
sent, from the arrays that are counted."""
_SENT_BYTES = 2 * PIECE_BYTES  # of an answer's text or copies: the piece that is sent, and the next


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """A parsed request to score."""

    teacher: HostedTeacher
    rows: list[Tokens]
    fields: Fields
    answer: Callable[[TeacherIdentity, list[Targets]], Response]
    """Function that makes the response in the form that the caller wants."""


def add_score_routes(app: FastAPI, service: Service) -> None:
    """Add the route to the app."""
    limits = service.limits

    @app.post("/v1/teachers/{name}/score", dependencies=[Depends(allow(Role.TRAINER)), Depends(same_wire)])
    async def score(name: str, request: Request) -> Response:
        """Score rows of token ids: T targets for each row of T tokens, from the cache where it has them."""
        teacher = service.teacher(name)
        reads = request_format(request)
        writes = answer_format(request, reads)
        _ = teacher.pool  # Unavailable while it starts, before a body is read

        def understand(body: bytes) -> ScoreCall:
            if reads == wire.JSON_MEDIA_TYPE:
                asked = wire.request_from_json(rows_of_tokens(body, limits))
            else:
                asked = wire.request_from_arrow(body, max_rows=limits.max_rows)

            def answer(identity: TeacherIdentity, targets: list[Targets]) -> Response:
                return targets_response(wire.ScoreAnswer(identity, targets), asked.fields, writes)

            return ScoreCall(teacher, asked.rows, asked.fields, answer)

        return await answer_call(service, request, understand)


async def answer_call(service: Service, request: Request, understand: Callable[[bytes], ScoreCall]) -> Response:
    """Read a body, score its rows and answer, within the limits and the caller's deadline.

    Raises:
        PotstillError: raised by `understand`, a limit, or the teacher.
        ClientDisconnect: the client left; its rows were taken out of the engine.
    """
    with service.admission.request() as reservation:
        begin = asyncio.get_running_loop().time()
        seconds = timeout_seconds(request)
        # HTTP's own word for it: neither looked up in the cache, nor kept.
        store = "no-store" not in request.headers.get("cache-control", "").lower()
        body = await read_body(request)

        async def answered() -> Response:
            call = await service.admission.parse(understand, body)
            front = call.teacher.front(store=store)
            # Refused for good before it is counted, and counted before any work: nothing scored is thrown away.
            num_tokens = check_request(call.rows, call.fields, teacher=front, limits=service.limits)
            size = num_tokens * call.fields.bytes_per_position(front.identity.vocab_size)
            reservation.hold_answer(_held_bytes(size, service.limits))
            held_until_answered(request).callback(reservation.release_answer)
            request.scope["state"][ANSWER_IS_COUNTED] = True
            with service.metrics.scoring(call.teacher.name, rows=len(call.rows), tokens=num_tokens):
                scoring = front.score(call.rows, call.fields, before_waiting=reservation.wait)
                targets = await within(seconds, begin, scoring)
            if size <= _WHOLE_BYTES[wire.ARROW_MEDIA_TYPE]:
                return call.answer(front.identity, targets)
            return await asyncio.to_thread(call.answer, front.identity, targets)

        return await while_connected(request.receive, answered())


def targets_response(answer: wire.ScoreAnswer, fields: Fields, writes: str) -> Response:
    """Make the response in the media type `writes`; `fields` tells K where there is no row."""
    num_positions = sum(targets.num_positions for targets in answer.targets)
    whole = num_positions * fields.bytes_per_position(answer.identity.vocab_size) <= _WHOLE_BYTES[writes]
    if writes == wire.JSON_MEDIA_TYPE:
        if whole:
            return JSONResponse(wire.answer_to_json(answer))
        pieces = json_pieces(answer.identity, lambda: answer.targets, says_format=False)
        return StreamingResponse(pieces, media_type=writes)
    if whole:
        return Response(wire.answer_to_arrow(answer, fields), media_type=writes)
    parts = list(wire.answer_parts(answer, fields))  # the arrays' own memory, none is copied
    size = sum(len(memoryview(part)) for part in parts)
    return StreamingResponse(_joined(parts), headers={"content-length": str(size)}, media_type=writes)


async def _joined(parts: list[Any]) -> AsyncIterator[bytes]:
    """Pieces to send. Copying one takes less time than a turn of the thread pool, which a plain iterator would take."""
    for piece in in_pieces(parts):
        yield piece


def _held_bytes(size: int, limits: LimitSettings) -> int:
    """Bytes that an answer of arrays of `size` bytes holds until it is sent."""
    if size <= min(_WHOLE_BYTES.values()):
        return size
    # An answer that fits its own bound fits the bounds of all, whatever is added.
    _, most = limits.smallest("max_answer_bytes_in_flight", "max_miss_bytes_in_flight")
    return max(size, min(size + _SENT_BYTES, most))
