"""Clients that send too much, too slowly, lie about it, or leave: over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from potstill.cache.errors import LimitExceeded, Overloaded
from potstill.cache.wire import scores as wire
from potstill.teacher_service.admission.shared_bound import SharedBound
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import FakeTeacher, GatedTeacher
from tests.support.processes.servers import hosted, serving, serving_teachers, wait_ready
from tests.support.waiting import until

PATH = "/v1/teachers/smol/score"
LIMITS = LimitSettings(max_body_bytes=100_000, max_body_bytes_in_flight=150_000, body_seconds=0.5)


@contextmanager
def talking(url: str, headers: str = "", *, path: str = PATH, method: str = "POST") -> Iterator[socket.socket]:
    """A plain connection that has sent the head of a request."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}\r\n"
        connection.sendall(head.encode())
        yield connection


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """Status and the rest of what comes until the other side closes or has sent its error."""
    received = b""
    while b"}" not in received and (chunk := connection.recv(65_536)):
        received += chunk
    return int(received.split(b" ")[1]), received.decode()


@pytest.fixture
def engine() -> FakeTeacher:
    return FakeTeacher()


@pytest.fixture
def service(engine: FakeTeacher) -> Service:
    return Service([hosted("smol", engine)], limits=LIMITS)


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with serving(create_app(service)) as address:
        wait_ready(address)
        yield address


def nothing_is_held(service: Service) -> bool:
    admission = service.admission
    bounds = (admission._answers, admission._misses)
    return not (admission.bodies.in_use or admission.requests_in_flight or any(bound.in_use for bound in bounds))


def test_a_body_that_comes_too_slowly_is_refused_and_the_connection_closed(url: str, service: Service) -> None:
    with talking(url, "content-length: 1000\r\n") as connection:
        connection.sendall(b'{"rows"')
        status, text = answer_of(connection)
        assert (status, '"kind":"request_timeout"' in text) == (408, True)
        assert "7 bytes of the body came within body_seconds=0.5" in text
        assert "retry-after: 1" in text.lower()
        assert connection.recv(100) == b""
    until(lambda: nothing_is_held(service))


def test_a_body_that_drips_is_refused_all_the_same(url: str) -> None:
    with talking(url, "content-length: 1000\r\n") as connection:
        begin = time.monotonic()
        connection.settimeout(0.05)
        received = b""
        while not received and time.monotonic() - begin < 10:
            connection.sendall(b" ")
            try:
                received = connection.recv(100)
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408")


def test_a_body_for_any_route_is_bounded(url: str) -> None:
    body = b'{"replicas": 1, "x": "' + b"x" * 100_000 + b'"}'
    reply = http.put(f"{url}/v1/teachers/smol/replicas", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["kind"]) == (413, "body_too_large")
    with talking(url, "content-length: 20\r\n", path="/v1/teachers/smol/replicas", method="PUT") as connection:
        assert answer_of(connection)[0] == 408


def test_more_than_was_announced_is_not_part_of_the_body(url: str, engine: FakeTeacher, service: Service) -> None:
    body = json.dumps({"rows": [[1, 2]], "fields": {"k": 1}}).encode()
    with talking(url, f"content-length: {len(body)}\r\n") as connection:
        connection.sendall(body + b"x" * 1000)
        # What follows is no request: the server may say so before the answer to the first one is ready.
        status = int(connection.recv(65_536).split(b" ")[1])
        assert status in (200, 400)
    until(lambda: nothing_is_held(service))
    assert len(engine.scored) <= 1


def test_a_length_that_is_a_lie_is_refused(url: str, service: Service) -> None:
    with talking(url, f"content-length: {10**12}\r\n") as connection:
        connection.sendall(b" " * 99_000)
        assert answer_of(connection)[0] == 408
    with talking(url, f"content-length: {10**12}\r\n") as connection:
        connection.sendall(b" " * 101_000)
        assert answer_of(connection)[0] == 413
    for bad in ("-1", "x", "1e3"):
        with talking(url, f"content-length: {bad}\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    until(lambda: nothing_is_held(service))


def test_chunks_without_an_end_are_refused_at_the_limit(url: str, service: Service) -> None:
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    with talking(url, "transfer-encoding: chunked\r\n") as connection:
        for _ in range(11):
            connection.sendall(chunk)
        status, text = answer_of(connection)
        assert (status, "max_body_bytes=100000" in text) == (413, True)
    until(lambda: nothing_is_held(service))


def test_huge_bodies_sent_again_and_again_hold_no_more_than_their_bound(url: str, service: Service) -> None:
    statuses: list[int] = []

    def send() -> None:
        with talking(url, "content-length: 99000\r\n") as connection:
            connection.sendall(b" " * 98_000)
            statuses.append(answer_of(connection)[0])

    senders = [threading.Thread(target=send) for _ in range(8)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert set(statuses) == {408, 429}
    until(lambda: nothing_is_held(service))
    assert service.admission.refusals["bodies"] == statuses.count(429)
    assert http.post(f"{url}{PATH}", json={"rows": [[1]]}).status_code == 200


def test_a_connection_that_is_half_closed_while_it_sends_leaves_nothing_behind(url: str, service: Service) -> None:
    with talking(url, "content-length: 1000\r\n") as connection:
        connection.sendall(b'{"rows"')
        until(lambda: service.admission.requests_in_flight == 1)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: nothing_is_held(service))
        assert connection.recv(100) == b""


def test_a_connection_that_is_half_closed_while_it_waits_leaves_the_engine() -> None:
    gated = GatedTeacher()
    service = Service([hosted("smol", gated)])
    with serving(create_app(service)) as url:
        wait_ready(url)
        body = json.dumps({"rows": [[1, 2]]}).encode()
        with talking(url, f"content-length: {len(body)}\r\n") as connection:
            connection.sendall(body)
            until(lambda: gated.waiting == 1)
            connection.shutdown(socket.SHUT_WR)
            until(lambda: gated.cancelled == 1 and nothing_is_held(service))
            assert connection.recv(100) == b""
        assert (gated.waiting, gated.scored) == (0, [])
        gated.gate.set()
        assert http.post(f"{url}{PATH}", json={"rows": [[1, 2]]}).status_code == 200


def test_an_answer_that_is_not_taken_is_given_up() -> None:
    limits = LimitSettings(body_seconds=1.0, max_miss_bytes_in_flight=30_000_000)
    service = Service([hosted("smol", FakeTeacher())], limits=limits)
    asked = {"rows": [[1, 2, 3, 4] * 1000] * 8, "fields": {"k": 64}}
    body = json.dumps(asked).encode()
    with serving(create_app(service)) as url:
        wait_ready(url)
        head = f"content-length: {len(body)}\r\naccept: application/vnd.apache.arrow.stream\r\n"
        with talking(url, head) as connection:
            connection.sendall(body)
            until(lambda: service.admission._misses.in_use > 0)
            # Its bytes count until they are taken: another answer as large has no room beside it.
            assert http.post(f"{url}{PATH}", json=asked).status_code == 429
            assert service.admission.refusals["misses"] == 1
            until(lambda: nothing_is_held(service))
            received = 0
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
            assert 0 < received < 16_000_000


def test_a_large_answer_arrives_whole() -> None:
    engine = FakeTeacher()
    with serving_teachers(hosted("smol", engine)) as url:
        asked = {"rows": [[1, 2, 3] * 500] * 3, "fields": {"k": 32}}
        reply = http.post(f"{url}{PATH}", json=asked)
        assert len(reply.content) > 600_000
        assert [len(row["ids"]) for row in reply.json()["rows"]] == [1500] * 3
        reply = http.post(f"{url}{PATH}", json=asked, headers={"accept": wire.ARROW_MEDIA_TYPE})
        assert int(reply.headers["content-length"]) == len(reply.content)
        assert [targets.num_positions for targets in wire.answer_from_arrow(reply.content).targets] == [1500] * 3


def test_one_key_cannot_take_every_place() -> None:
    refusals: Counter[str] = Counter()
    bound = SharedBound(16, "places", reason="requests", refusals=refusals, retry_after=lambda: 7.0)
    for _ in range(14):
        bound.take("much", 1)
    with pytest.raises(Overloaded, match="14 places are in flight of at most 16.*can have 14") as refusal:
        bound.take("much", 1)
    assert refusal.value.retry_after == 7.0
    bound.take("little", 1)
    bound.take("little", 1)
    with pytest.raises(Overloaded, match="16 places are in flight of at most 16; retry later"):
        bound.take("little", 1)
    assert refusals == {"requests": 2}
    with pytest.raises(LimitExceeded, match="17 places are over the 16 that all together may have"):
        bound.take("little", 17)
    for _ in range(14):
        bound.give_back("much", 1)
    with bound.hold("", 14):  # without keys there is nobody to keep anything for
        assert bound.in_use == 16
    assert bound.in_use == 2


def test_one_request_of_one_key_may_have_all_that_nobody_else_has() -> None:
    bound = SharedBound(16, "bytes", reason="bodies", refusals=Counter())
    for held in range(0, 16, 4):
        bound.take("ann", 4, own=held)
    bound.give_back("ann", 16)
    bound.take("ann", 4)
    bound.take("ann", 10, own=0)  # another request of the key, up to the last eighth
    with pytest.raises(Overloaded, match="a key that holds half"):
        bound.take("ann", 1, own=10)
    bound.take("bob", 2)


def test_a_body_over_the_bound_of_all_together_is_not_told_to_come_again() -> None:
    limits = LimitSettings(max_body_bytes_in_flight=50_000)
    with serving(create_app(Service([hosted("smol", FakeTeacher())], limits=limits))) as url:
        reply = http.post(url + PATH, content=b" " * 60_000, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert "max_body_bytes_in_flight=50000" in reply.json()["detail"]
