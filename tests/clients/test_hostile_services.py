"""Services that are broken or not ours: what they send costs a client little, and its deadline holds."""

from __future__ import annotations

import asyncio
import gzip
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from starlette.responses import JSONResponse, Response

from potstill.cache import Fields
from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import DeadlineExceeded, InvalidInput, PotstillError, TeacherFailed, Unavailable
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import StreamHead, write_array
from potstill.clients.doctor.service_checks import check_service
from potstill.clients.http_admin import HttpAdmin
from potstill.clients.http_corpus import read_array
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import HttpTeacher
from potstill.clients.retry import RetryPolicy
from potstill.clients.sync_connection import SyncConnection
from potstill.teacher_service.settings import TeacherSettings
from tests.support.fakes import fake_identity
from tests.support.findings import levels
from tests.support.processes.servers import serving
from tests.support.scored_rows import rows_of

ONCE = RetryPolicy(attempts=1)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
FINGERPRINT = "0" * 64


@contextmanager
def sending(*pieces: bytes, again: bytes = b"", pause: float = 0.0) -> Iterator[str]:
    """A service that sends these bytes to every request and then `again` for ever, with a pause before each."""
    closed = threading.Event()

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            try:
                for piece in pieces:
                    self.request.sendall(piece)
                while again and not closed.wait(pause):
                    self.request.sendall(again)
            except OSError:
                pass  # the client had enough

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            closed.set()
            server.shutdown()
            thread.join()


def ask_async(url: str, timeout: float) -> object:
    async def ask() -> object:
        async with HttpTeacher.open(url, "smol", retry=ONCE, timeout=timeout) as teacher:
            return teacher

    return asyncio.run(ask())


def ask_sync(url: str, timeout: float) -> object:
    with SyncConnection(url, retry=ONCE, timeout=timeout) as connection:
        return connection.json("/v1/corpora")


both_clients = pytest.mark.parametrize("ask", [ask_async, ask_sync])
Ask = Callable[[str, float], object]


@both_clients
@pytest.mark.parametrize("status", [b"200 OK", b"500 Oops"])
def test_an_encoded_body_is_never_unpacked(ask: Ask, status: bytes) -> None:
    body = gzip.compress(json.dumps({"format": "1", "kind": "unavailable", "detail": "unpacked"}).encode())
    head = b"HTTP/1.1 %s\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    with sending(head + body) as url, pytest.raises(TeacherFailed, match="encoded as 'gzip'|answered 500 without"):
        ask(url, 60.0)


@both_clients
def test_an_endless_answer_is_cut(ask: Ask) -> None:
    with (
        sending(HEAD + b"\r\n[", again=b"[]," * 20_000) as url,
        pytest.raises(TeacherFailed, match="more than 16777216 bytes"),
    ):
        ask(url, 60.0)


@both_clients
@pytest.mark.parametrize("head", [HEAD + b"x-slow: ", HEAD + b"\r\n", b""])
def test_a_deadline_bounds_a_call_that_is_answered_byte_by_byte(ask: Ask, head: bytes) -> None:
    begin = time.monotonic()
    with sending(head, again=b" ", pause=0.05) as url, pytest.raises((DeadlineExceeded, Unavailable)):
        ask(url, 0.3)
    assert time.monotonic() - begin < 5.0


async def test_the_doctor_reads_no_page_to_its_end() -> None:
    with sending(HEAD + b"\r\n", again=b"[" * 60_000) as url:
        _, findings = await check_service(url)
    assert levels(findings) == {"service": "fail", "clock": "warn", "access": "ok"}


@contextmanager
def describing(spec: dict[str, Any], answer: Response) -> Iterator[HttpCache]:
    """A cache behind a service that describes corpora by `spec`, and answers all else by `answer`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            described = JSONResponse({"format": "1", "spec": spec, "teachers": {}})
            await (described if scope["path"] == "/v1/corpora/docs" else answer)(scope, receive, send)

    with serving(app) as url, HttpCache(url, retry=ONCE, timeout=60) as cache:
        yield cache


def seal(**changed: Any) -> dict[str, Any]:
    counts = {"vocab_size": 9, "num_rows": 2, "num_positions": 4, "num_shards": 1, "longest_row": 2, "max_token_id": 8}
    names = {"fingerprint": FINGERPRINT, "tokenizer_sha256": "0" * 64, "sources": []}
    return {**counts, **names, "row_tokens": 2, "duplicate_rows": 0, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_shards": 10**13, "num_rows": 10**13, "num_positions": 10**13}, "num_shards is 10000000000000, over"),
        ({"num_rows": 2**33, "num_positions": 2**34}, "num_rows is"),
        ({"num_shards": 3}, "impossible counts"),
        ({"longest_row": 5}, "impossible counts"),
        ({"vocab_size": 2**31}, "vocab_size is"),
        ({"num_rows": True}, "impossible counts"),
        ({"tokenizer_sha256": None}, "impossible names"),
    ],
)
def test_counts_of_a_corpus_are_bounded(changed: dict[str, Any], words: str) -> None:
    with describing(seal(**changed), Response()) as cache, pytest.raises(TeacherFailed, match=words):
        cache.corpus("docs")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (np.array([1, 2, 2**32 - 1, 4], np.uint32), "token id 4294967295"),
        (np.array([1.0, 2.0, np.nan, 4.0]), "gave float64"),
        (np.zeros((4, 3), np.uint32), "of shape"),
    ],
)
def test_tokens_are_ids_of_the_tokenizer(part: Any, words: str) -> None:
    head = StreamHead(batches=1, length=len(part), corpus=FINGERPRINT)
    answer = Response(b"".join(write_array(head, [part])), media_type=wire.ARROW_MEDIA_TYPE)
    with describing(seal(), answer) as cache, pytest.raises(TeacherFailed, match=words):
        cache.corpus("docs").tokens(0, 4)


def test_a_stream_of_batches_of_nothing_is_given_up() -> None:
    head = StreamHead(batches=2**40, length=4, corpus=FINGERPRINT)
    whole = b"".join(write_array(StreamHead(batches=1, length=0, corpus=FINGERPRINT), [np.empty(0, np.uint32)]))
    schema = next(iter(write_array(head, [np.empty(0, np.uint32)])))
    batch = whole[whole.index(b"\xff\xff\xff\xff", 4) : -8]
    arrow = b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.apache.arrow.stream\r\n\r\n"
    begin = time.monotonic()
    with (
        sending(arrow + schema, again=batch, pause=0.02) as url,
        SyncConnection(url, retry=ONCE, timeout=0.5) as connection,
        pytest.raises(DeadlineExceeded),
    ):
        read_array(connection, "/v1/corpora/docs/tokens", 0, 4, FINGERPRINT, lambda *_: None)
    assert time.monotonic() - begin < 5.0


async def test_an_answer_is_not_larger_than_what_was_asked_for() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked = scope["method"] == "POST"
            answer = Response(bytes(2**21)) if asked else JSONResponse({"identity": fake_identity().to_json()})
            await answer(scope, receive, send)

    with serving(app) as url:
        async with HttpTeacher.open(url, "smol", retry=ONCE) as teacher:
            with pytest.raises(TeacherFailed, match="answered more than"):
                await teacher.score(rows_of(3), Fields(k=4))


async def test_an_error_of_a_megabyte_is_shown_in_part() -> None:
    error = json.dumps({"kind": "invalid_input", "detail": "x" * 2**19}).encode()
    head = b"HTTP/1.1 422 No\r\ncontent-length: %d\r\n\r\n" % len(error)
    with sending(head + error) as url:
        async with HttpAdmin.open(url) as admin:
            with pytest.raises(PotstillError) as told:
                await admin.teachers()
    assert len(told.value.detail) < 5000


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, None),
        ({"api_key_env": "POTSTILL_API_KEY"}, "Bearer own"),
        ({"api_key_env": "POTSTILL_API_KEY_PEER"}, "Bearer peer"),
        ({"api_key": "given"}, "Bearer given"),
    ],
)
async def test_a_service_shows_its_key_only_where_a_teachers_options_name_it(
    options: dict[str, Any], sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_API_KEY", "own")
    monkeypatch.setenv("POTSTILL_API_KEY_PEER", "peer")
    seen: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(dict(scope["headers"]).get(b"authorization", b"").decode() or None)
            listed = {"teachers": [{"name": "smol"}], "identity": fake_identity().to_json()}
            await JSONResponse(listed)(scope, receive, send)

    with serving(app) as url:
        settings = TeacherSettings(name="peer", model=url, options=options)
        async with open_teacher(settings.model, options=settings.factory_options):
            pass
    assert seen == [sent, sent]


async def test_no_other_secret_of_a_service_is_sent_as_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(InvalidInput, match="begins with POTSTILL_API_KEY"):
        async with open_teacher("http://127.0.0.1:9", options={"api_key_env": "AWS_SECRET_ACCESS_KEY"}):
            pass
