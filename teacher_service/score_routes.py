"""`POST /v1/teachers/{name}/score`: rows in, targets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from cache import wire
from cache.errors import DeadlineExceeded, InvalidInput
from cache.types import Targets
from teacher_service.admission import (
    answer_format,
    bytes_per_position,
    check_request,
    read_body,
    request_format,
    timeout_seconds,
)
from teacher_service.answers import targets_response
from teacher_service.replicas import HostedTeacher
from teacher_service.service import Service

T = TypeVar("T")
_SMALL_BYTES = 64 * 2**10  # (de)serialised on the event loop: less than a millisecond


def add_score_routes(app: FastAPI, service: Service) -> None:
    """Add the route to the app."""

    @app.post("/v1/teachers/{name}/score")
    async def score(name: str, request: Request) -> Response:
        teacher = service.teacher(name)
        with service.admission.request():
            return await _while_connected(request, await _prepare_score(service, teacher, request))


async def _prepare_score(service: Service, teacher: HostedTeacher, request: Request) -> Coroutine[Any, Any, Response]:
    """Check and read everything that needs no teacher; the coroutine does the rest."""
    reads = request_format(request)
    writes = answer_format(request, reads)
    seconds = timeout_seconds(request)
    front = teacher.front(store="no-store" not in request.headers.get("cache-control", "").lower())
    body = await read_body(request, service.limits.max_body_bytes)
    decode = _from_json if reads == wire.JSON_MEDIA_TYPE else wire.request_from_arrow

    async def finish() -> Response:
        asked = await _off_loop(len(body), lambda: decode(body))
        num_tokens = check_request(asked.rows, asked.fields, teacher=front, limits=service.limits)
        with service.admission.tokens(num_tokens):
            targets = await _within(seconds, front.score(asked.rows, asked.fields))
        service.metrics.rows.labels(teacher.name).inc(len(targets))
        service.metrics.tokens.labels(teacher.name).inc(num_tokens)
        answer = wire.ScoreAnswer(front.identity, targets)
        size = num_tokens * bytes_per_position(asked.fields, front.identity.vocab_size)
        return await _off_loop(size, lambda: targets_response(answer, asked.fields, writes))

    return finish()


def _from_json(body: bytes) -> wire.ScoreRequest:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    return wire.request_from_json(value)


async def _off_loop(num_bytes: int, call: Callable[[], T]) -> T:
    return call() if num_bytes < _SMALL_BYTES else await asyncio.to_thread(call)


async def _within(seconds: float | None, scoring: Coroutine[Any, Any, list[Targets]]) -> list[Targets]:
    try:
        async with asyncio.timeout(seconds) as deadline:
            return await scoring
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise DeadlineExceeded(f"not scored within the {seconds:g} seconds that the caller gave") from error


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
