"""What answers hold while they are made and sent: hits and what waits for an engine are bounded apart."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from potstill.cache import Cache
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Fields, Targets, Tokens
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import FakeTeacher, GatedTeacher
from tests.support.processes.servers import asked_by_hand, hosted, post_json, serving, wait_ready
from tests.support.waiting import until

K = 4
JSON = {"content-type": "application/json"}
ROW_BYTES = 3 * Fields(k=K).bytes_per_position(64)


def asked(*firsts: int) -> dict[str, object]:
    """Rows of three tokens."""
    return {"rows": [[first, 1, 2] for first in firsts], "fields": {"k": K}}


class Served:
    """A service whose engine waits at a gate, and which knows the rows that begin with 1 and 2."""

    def __init__(self, folder: Path, limits: LimitSettings) -> None:
        self.teacher = GatedTeacher()
        keep = Keep(Cache.open(folder, mode="r+"), KeepPolicy(k=K))
        self.service = Service([hosted("smol", self.teacher, keep)], limits=limits)
        self.pool = ThreadPoolExecutor(8)
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Served]:
        with serving(create_app(self.service)) as self.url, self.pool:
            wait_ready(self.url)
            self.teacher.gate.set()
            assert post_json(self.url, asked(1, 2)).status_code == 200
            self.settle()
            self.teacher.gate.clear()
            try:
                yield self
            finally:
                self.teacher.gate.set()

    def waiting(self, *firsts: int, **headers: str) -> Future[httpx.Response]:
        """A request whose answer is held among the misses by now, as it waits for the engine."""
        held = self.service.admission._misses
        before = held.in_use
        reply = self.pool.submit(post_json, self.url, asked(*firsts), **headers)
        until(lambda: held.in_use == before + len(firsts) * ROW_BYTES)
        return reply

    def settle(self) -> None:
        """Wait until nothing is held: that is given back after the client has its answer."""
        bounds = (self.service.admission._answers, self.service.admission._misses)
        until(lambda: not any(bound.in_use for bound in bounds))


def test_misses_that_queue_take_no_place_of_a_hit(tmp_path: Path) -> None:
    limits = LimitSettings(max_answer_bytes_in_flight=2 * ROW_BYTES)
    with Served(tmp_path / "c", limits).running() as served:
        # One is known in part, one is asked without storing, and the last joins the score of the first.
        misses = [served.waiting(3, 4), served.waiting(1, 5), served.waiting(6, **{"cache-control": "no-store"})]
        misses.append(served.waiting(3))
        assert served.service.admission._answers.in_use == 0
        for _ in range(3):
            assert post_json(served.url, asked(1, 2)).status_code == 200
        served.teacher.gate.set()
        assert [miss.result().status_code for miss in misses] == [200] * 4
        served.settle()
        assert +served.service.admission.refusals == {}


def test_a_miss_over_the_bound_of_misses_is_refused_before_it_is_scored_and_hits_are_answered(tmp_path: Path) -> None:
    limits = LimitSettings(max_miss_bytes_in_flight=2 * ROW_BYTES)
    with Served(tmp_path / "c", limits).running() as served:
        scored = len(served.teacher.scored)
        first = served.waiting(3, 4)
        for headers in ({}, {"cache-control": "no-store"}):
            reply = post_json(served.url, asked(5), **headers)
            assert (reply.status_code, reply.json()["kind"]) == (429, "overloaded")
            assert "bytes of answers to misses are in flight" in reply.json()["detail"]
            assert int(reply.headers["retry-after"]) >= 1
        assert post_json(served.url, asked(1, 2)).status_code == 200
        assert +served.service.admission.refusals == {"misses": 2}
        served.teacher.gate.set()
        assert first.result().status_code == 200
        assert len(served.teacher.scored) == scored + 2
        served.settle()
        assert post_json(served.url, asked(5)).status_code == 200
    cached = served.service.teachers["smol"].cached
    assert cached is not None
    assert cached._in_flight == {}


def test_a_hit_is_still_bounded(tmp_path: Path) -> None:
    with Served(tmp_path / "c", LimitSettings(max_answer_bytes_in_flight=2 * ROW_BYTES)).running() as served:
        with served.service.admission._answers.hold("", ROW_BYTES):
            reply = post_json(served.url, asked(1, 2))
        assert (reply.status_code, reply.json()["kind"]) == (429, "overloaded")
        assert "bytes of answers are in flight" in reply.json()["detail"]
        assert post_json(served.url, asked(1, 2)).status_code == 200


def test_an_answer_that_can_never_have_room_is_refused_for_good(tmp_path: Path) -> None:
    limits = LimitSettings(max_answer_bytes_in_flight=3 * ROW_BYTES, max_miss_bytes_in_flight=2 * ROW_BYTES)
    with Served(tmp_path / "c", limits).running() as served:
        scored = len(served.teacher.scored)
        for firsts in ((1, 2, 1, 2), (3, 4, 5)):
            reply = post_json(served.url, asked(*firsts))
            assert (reply.status_code, reply.json()["kind"]) == (422, "limit_exceeded")
            assert reply.json()["detail"].startswith(f"{len(firsts) * ROW_BYTES} bytes of answers")
            assert "retry-after" not in reply.headers
        assert len(served.teacher.scored) == scored
        served.settle()


def test_what_a_client_that_left_held_is_given_back_once(tmp_path: Path) -> None:
    with Served(tmp_path / "c", LimitSettings()).running() as served:
        with asked_by_hand(served.url, asked(3)):
            until(lambda: served.service.admission._misses.in_use == ROW_BYTES)
            second = served.waiting(3)
        until(lambda: served.service.admission._misses.in_use == ROW_BYTES)
        served.teacher.gate.set()
        assert second.result().status_code == 200
        served.settle()


class WatchingTeacher(FakeTeacher):
    """Notes what is held of the bounds while each of its calls is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.service = Service([hosted("smol", self)])
        self.held: list[tuple[int, int, int]] = []

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        admission = self.service.admission
        self.held.append((admission.requests_in_flight, admission._answers.in_use, admission._misses.in_use))
        return await super().score(rows, want)

    def held_nothing_of_others(self) -> None:
        assert self.held == [(0, 0, ROW_BYTES)] * 3
        until(lambda: self.service.admission._misses.in_use == 0)


def long_request(num_bytes: int) -> bytes:
    """In JSON, of one short row."""
    return json.dumps(asked(7)).encode().ljust(num_bytes)


def test_a_request_moves_nothing_of_an_earlier_one_on_its_connection() -> None:
    teacher = WatchingTeacher()
    with serving(create_app(teacher.service)) as url, httpx.Client(timeout=http.SECONDS, base_url=url) as client:
        wait_ready(url)
        for _ in range(3):
            # Longer than what the server reads ahead: it stops reading, and goes on for the request that takes it.
            reply = client.post("/v1/teachers/smol/score", content=long_request(300_000), headers=JSON)
            assert reply.status_code == 200
        teacher.held_nothing_of_others()


def test_a_pipelined_request_moves_nothing_of_the_one_before() -> None:
    teacher = WatchingTeacher()
    body = long_request(100)
    lines = (
        "POST /v1/teachers/smol/score HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        "content-length: 100",
    )
    head = "\r\n".join((*lines, "", "")).encode()
    with serving(create_app(teacher.service)) as url:
        wait_ready(url)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=300) as connection:
            connection.sendall((head + body) * 3)
            until(lambda: len(teacher.held) == 3)
        teacher.held_nothing_of_others()
