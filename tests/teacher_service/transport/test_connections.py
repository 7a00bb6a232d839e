"""Connections that never become a request, or whose answer nobody takes: over real sockets."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache.errors import InvalidInput
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.routes.completions import prompt_logprobs
from potstill.teacher_service.settings.service import LimitSettings
from potstill.teacher_service.transport.listener import BoundedListener, _origin, allow_files
from tests.support import http
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.certificate import make_certificate
from tests.support.processes.servers import hosted, serving, serving_teachers, wait_ready

LIMITS = LimitSettings(body_seconds=1.5, max_connections=8)


@pytest.fixture
def url() -> Iterator[str]:
    with serving_teachers(hosted("smol", FakeTeacher()), limits=LIMITS) as address:
        yield address


def connected(url: str, source: str = "127.0.0.1") -> socket.socket:
    host, _, port = url.partition("://")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=300, source_address=(source, 0))


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends it, within the socket's timeout."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return True


GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = POST + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


def said_until_closed(url: str, sent: bytes) -> bytes:
    with connected(url) as connection:
        said = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(65_536):
                said += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return said


@pytest.mark.parametrize(
    "sent",
    [
        GET + b"x-a: " + b"a" * 100_000 + b"\r\n\r\n",
        GET + b"b" * 100_000 + b": \r\n\r\n",
        GET + b"a:\r\n" * 300 + b"\r\n",
        GET.replace(b"healthz", b"a" * 100_000) + b"\r\n",
        b"\r\n" * 50_000 + GET + b"\r\n",
    ],
)
def test_a_head_over_the_bound_is_refused(sent: bytes) -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        said = said_until_closed(url, sent)
    assert not said or said.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize(
    "behind",
    [
        b"0\r\n" + b"x-a: b\r\n" * 300 + b"\r\n",
        b"0\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n",
        b"1;" + b"a" * 100_000 + b"\r\n[\r\n0\r\n\r\n",
    ],
)
def test_what_comes_beside_a_chunked_body_is_bounded(behind: bytes) -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        assert b"{" not in said_until_closed(url, CHUNKED + behind)


def test_too_many_fields_are_told_so_and_nothing_is_served(url: str) -> None:
    said = said_until_closed(url, GET + b"a:\r\n" * 300 + b"\r\n")
    assert said.startswith(b"HTTP/1.1 431 ")
    assert b"256 fields" in said
    assert said.count(b"HTTP/1.1") == 1


def test_trailers_behind_an_answer_get_none_of_their_own(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(POST + b"content-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        said = b""
        # The head and the body of an answer may come apart.
        while not said.endswith(b'"code":415}}'):
            part = connection.recv(65_536)
            assert part, said
            said += part
        assert said.startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"a:\r\n" * 300 + b"\r\n")
        assert connection.recv(65_536) == b""


def test_a_body_does_not_wait_for_the_receipt_of_its_head() -> None:
    with (
        BoundedListener(socket.create_server(("127.0.0.1", 0)), LIMITS) as listener,
        socket.create_connection(listener.getsockname(), timeout=300),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_few_requests_wait_behind_one() -> None:
    body = b'{"rows": [[1, 2, 3]]}'
    head = b"POST /v1/teachers/slow/score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    asked = head + b"content-length: %d\r\n\r\n" % len(body) + body
    with serving_teachers(hosted("slow", FakeTeacher(tokens_per_second=1.0))) as url:
        assert said_until_closed(url, asked + (GET + b"\r\n") * 10) == b""


def test_a_head_and_a_body_of_common_size_are_served(url: str) -> None:
    headers = {f"x-{number}": "a" * 200 for number in range(200)}
    body = json.dumps({"rows": [[1, 2, 3]] * 2, "pad": "a" * 200_000})
    with httpx.Client(timeout=http.SECONDS, base_url=url, headers=headers) as client:
        for _ in range(3):
            assert client.get("/healthz").status_code == 200
            asked = (part.encode() for part in (body[:7], body[7:8], body[8:]))
            reply = client.post("/v1/teachers/smol/score", content=asked, headers={"content-type": "application/json"})
            assert "unknown key" in reply.text


def drip(connection: socket.socket) -> None:
    for _ in range(200):
        connection.sendall(b"a")
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-a: "])
def test_a_connection_without_a_whole_head_is_closed(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_head_that_drips_is_closed_all_the_same_also_a_later_one(url: str, before: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(before)
        if before:
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\nx-a: ")
        with pytest.raises(OSError):  # noqa: PT011 -- a reset or a broken pipe, as it happens
            drip(connection)


def test_requests_that_take_longer_than_a_head_may_are_served(url: str) -> None:
    with httpx.Client(timeout=http.SECONDS, base_url=url) as client:
        for _ in range(3):
            assert client.get("/healthz").status_code == 200
            time.sleep(0.8)


def test_connections_over_the_bound_are_told_so() -> None:
    patient = LimitSettings(max_connections=8)
    with serving_teachers(hosted("smol", FakeTeacher()), limits=patient) as url:
        with ExitStack() as held:
            for _ in range(patient.max_connections):
                held.enter_context(served_connection(url))
            assert "max_connections=8 are open" in refusal(connected(url))
        until_served(url)


def served_connection(url: str) -> socket.socket:
    """One that is counted: the service may take a moment to see that others were closed."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        connection = connected(url)
        connection.sendall(GET + b"\r\n")
        if connection.recv(65_536).startswith(b"HTTP/1.1 200"):
            return connection
        connection.close()
    pytest.fail("never served")


def refusal(connection: socket.socket) -> str:
    with connection:
        reply = connection.recv(65_536).decode()
    assert reply.startswith("HTTP/1.1 503 ")
    assert '"kind": "unavailable"' in reply
    return reply


def until_served(url: str, source: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with httpx.Client(timeout=http.SECONDS, transport=httpx.HTTPTransport(local_address=source)) as client:
                if client.get(f"{url}/healthz").status_code == 200:
                    return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_address_does_not_take_all_connections() -> None:
    limits = LimitSettings(max_connections=8, max_connections_per_address=3)
    with serving_teachers(hosted("smol", FakeTeacher()), limits=limits) as url, ExitStack() as held:
        until_served(url)
        taken = [held.enter_context(connected(url, "127.0.0.2")) for _ in range(3)]
        assert "max_connections_per_address=3 are open from 127.0.0.2;" in refusal(connected(url, "127.0.0.2"))
        until_served(url)
        taken[0].close()
        until_served(url, "127.0.0.2")


def test_with_tls_connections_count_before_the_handshake_which_has_little_time(tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    limits = LimitSettings(body_seconds=1.0, max_connections=8, max_connections_per_address=4)
    app = create_app(Service([hosted("smol", FakeTeacher())]))
    tls: dict[str, Any] = {"ssl_certfile": certfile, "ssl_keyfile": keyfile}
    with serving(app, limits=limits, **tls) as url, ExitStack() as held:
        silent = [held.enter_context(connected(url, "127.0.0.2")) for _ in range(5)]
        assert is_closed(silent[4])
        trusting = ssl.create_default_context(cafile=str(certfile))
        assert http.get(f"{url}/healthz", verify=trusting).status_code == 200
        assert all(is_closed(each) for each in silent[:4])


def test_more_connections_than_files_are_refused_at_the_start() -> None:
    with pytest.raises(InvalidInput, match="max_connections=1000000000000 needs 1000000000256 open files"):
        allow_files(LimitSettings(max_connections=10**12))


def test_zero_bounds_no_address() -> None:
    limits = LimitSettings(max_connections=8, max_connections_per_address=0)
    with serving_teachers(hosted("smol", FakeTeacher()), limits=limits) as url, ExitStack() as held:
        taken = [held.enter_context(connected(url)) for _ in range(7)]
        until_served(url)
        for connection in taken:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("peer", "origin"),
    [
        (("192.0.2.7", 4711), "192.0.2.7"),
        (("::ffff:192.0.2.7", 4711, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 4711, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80::/64"),
        ("/run/socket", ""),
        (None, ""),
    ],
)
def test_an_address_is_what_one_client_has(peer: object, origin: str) -> None:
    assert _origin(peer) == origin


def test_of_an_answer_that_is_not_taken_no_more_is_made_and_its_connection_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[int] = []
    text_of = prompt_logprobs._positions_text

    def counted(*positions: object) -> bytes:
        made.append(1)
        return text_of(*positions)  # type: ignore[arg-type]

    monkeypatch.setattr(prompt_logprobs, "_positions_text", counted)
    service = Service([hosted("x", FakeTeacher(fake_identity(vocab_size=256)))], limits=LIMITS)
    asked = {"prompt": [list(range(250))] * 40, "prompt_logprobs": 128, "max_tokens": 1}
    body = json.dumps(asked).encode()
    with serving(create_app(service), limits=LIMITS) as url:
        wait_ready(url)
        with socket.socket() as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, _, port = url.removeprefix("http://").partition(":")
            small.settimeout(300)
            small.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
            small.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            deadline = time.monotonic() + 300
            while "is given up" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            before = len(made)
            time.sleep(1.5)
            assert len(made) == before
            assert is_closed(small)
    assert before > 0
    assert "Exception in ASGI" not in caplog.text
    assert "without completing" not in caplog.text
