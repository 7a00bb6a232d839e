"""What a route answers counts while it is sent, whatever route it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from potstill.cache.errors import PotstillError
from potstill.teacher_service.admission import Admission
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings import LimitSettings
from potstill.teacher_service.transport import BoundedTransfers
from potstill.teacher_service.transport.bounded_transfers import SHORT_ANSWER_BYTES
from tests.support import http
from tests.support.corpora import make_corpus
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving, wait_ready
from tests.support.waiting import until

LONG = 300_000


def answer_error(_: Request, error: PotstillError) -> Response:
    return JSONResponse({"kind": error.kind}, status_code=error.status)


class Client:
    """The other side of one request, which takes nothing of an answer's body until it is told to."""

    def __init__(self) -> None:
        self.status = 0
        self.received = 0
        self.begun = asyncio.Event()
        self.takes = asyncio.Event()

    async def receive(self) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.begun.set()
            return
        await self.takes.wait()
        self.received += len(message["body"])

    async def ask(self, admission: Admission, answer: Response) -> None:
        served = BoundedTransfers(answer, admission, answer_error)
        await served({"type": "http", "method": "HEAD", "path": "/", "headers": []}, self.receive, self.send)


async def test_a_whole_answer_counts_until_it_is_taken() -> None:
    admission = Admission(LimitSettings(max_answer_bytes_in_flight=2 * LONG))
    slow, late, short = Client(), Client(), Client()
    for each in (late, short):
        each.takes.set()
    asking = asyncio.create_task(slow.ask(admission, Response(b"a" * LONG)))
    await slow.begun.wait()
    assert admission._answers.in_use >= LONG
    # There is no room for another, and nothing of it was sent; errors and probes are short, and get through.
    await late.ask(admission, Response(b"b" * LONG))
    await short.ask(admission, Response(b"c" * SHORT_ANSWER_BYTES))
    assert (late.status, short.status, short.received) == (429, 200, SHORT_ANSWER_BYTES)
    slow.takes.set()
    await asking
    assert (slow.status, slow.received, admission._answers.in_use) == (200, LONG, 0)


@contextmanager
def served(folder: Path, limits: LimitSettings) -> Iterator[tuple[str, Service]]:
    cache, _ = make_corpus(folder / "c")
    service = Service([hosted("smol", FakeTeacher())], cache=cache, limits=limits)
    with serving(create_app(service)) as url:
        wait_ready(url)
        yield url, service


@pytest.mark.parametrize("path", ["tokenizer", "tokens", "row_keys"])
def test_corpus_routes_count_what_they_hold(tmp_path: Path, path: str) -> None:
    with served(tmp_path, LimitSettings(max_answer_bytes_in_flight=1000, max_answer_bytes=1000)) as (url, service):
        refused = http.get(f"{url}/v1/corpora/docs/{path}")
    assert (refused.status_code, refused.json()["kind"]) == (422, "limit_exceeded")
    assert service.admission.refusals["answers"] == 1


def test_a_tokenizer_is_streamed_as_it_was_sealed(tmp_path: Path) -> None:
    with served(tmp_path, LimitSettings()) as (url, service):
        assert service.cache is not None
        reply = http.get(f"{url}/v1/corpora/docs/tokenizer")
        assert reply.text == service.cache.corpus("docs").tokenizer.to_str()
        assert http.get(reply.url, headers={"if-none-match": reply.headers["etag"]}).status_code == 304
        until(lambda: service.admission._answers.in_use == 0)
