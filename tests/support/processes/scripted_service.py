"""A service that answers by a script, for what ours never says or seldom does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from potstill.cache.errors import MediaTypeError, Overloaded, PotstillError, Unavailable
from potstill.cache.wire import scores as wire
from tests.support.fakes import FakeTeacher, fake_identity


class Script:
    """An ASGI app that answers each score request with the next step, the last one for ever.

    A step is a status (with the service's error body), `cut` (half an answer, then the connection breaks),
    `hang`, `html`, or a function of the request's body that gives the answer's.
    """

    def __init__(self, *steps: Any, headers: dict[str, str] | None = None) -> None:
        self.steps = list(steps)
        self.headers = headers or {}
        self.requests: list[dict[str, str]] = []
        self.identity = fake_identity()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["method"] == "GET":
            description = {"name": "smol", "identity": self.identity.to_json()}
            await reply(send, 200, json.dumps(description).encode())
            return
        self.requests.append({key.decode(): value.decode() for key, value in scope["headers"]})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        await self.play(step, body, send)

    async def play(self, step: Any, body: bytes, send: Any) -> None:
        if step == "hang":
            await asyncio.sleep(60)
        elif step == "html":
            await reply(send, 502, b"<html>bad gateway</html>")
        elif step == "cut":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": False})
        elif isinstance(step, int):
            error = {429: Overloaded, 503: Unavailable, 500: PotstillError, 415: MediaTypeError}[step]
            content = json.dumps({"kind": error.kind, "detail": f"scripted {step}"}).encode()
            await reply(send, step, content, self.headers)
        else:
            await reply(send, 200, step(self, body))


async def reply(send: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    pairs = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def answered(script: Script, body: bytes) -> bytes:
    request = wire.request_from_arrow(body)
    fake = FakeTeacher(script.identity)
    targets = [fake.distribution(row, request.fields.k) for row in request.rows]
    return wire.answer_to_arrow(wire.ScoreAnswer(script.identity, targets), request.fields)
