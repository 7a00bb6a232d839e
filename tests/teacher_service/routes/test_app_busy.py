"""The service while its teachers are busy, starting or broken."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from potstill.cache.cache import Cache
from potstill.cache.errors import TeacherFailed
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import Teacher
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher, Keep
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import BrokenTeacher, FakeTeacher, GatedTeacher
from tests.support.processes.servers import (
    asked_by_hand,
    hosted,
    post_json,
    refused,
    serving,
    serving_teachers,
    wait_ready,
)
from tests.support.waiting import until


def test_tokens_over_the_bound_are_told_to_come_back() -> None:
    teacher = GatedTeacher()
    limits = LimitSettings(max_tokens_in_flight=10)
    with serving_teachers(hosted("smol", teacher), limits=limits) as url:
        first = threading.Thread(target=post_json, args=(url, {"rows": [[1] * 6]}))
        first.start()
        until(lambda: teacher.waiting == 1)
        reply = post_json(url, {"rows": [[1] * 5]})
        assert "10" in refused(reply, 429, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert 'potstill_tokens_in_flight{teacher="smol"} 6.0' in http.get(f"{url}/metrics").text
        teacher.gate.set()
        first.join()
        assert post_json(url, {"rows": [[1] * 10]}).status_code == 200
        assert 'potstill_tokens_in_flight{teacher="smol"} 0.0' in http.get(f"{url}/metrics").text


def test_requests_over_the_bound_are_told_to_come_back() -> None:
    with serving_teachers(hosted("smol", FakeTeacher()), limits=LimitSettings(max_requests_in_flight=1)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as first:
            head = "POST /v1/teachers/smol/score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            first.sendall(f"{head}content-length: 100\r\n\r\n".encode())
            until(lambda: "potstill_requests_in_flight 1.0" in http.get(f"{url}/metrics").text)
            refused(post_json(url, {"rows": [[1]]}), 429, "overloaded")
            assert http.get(f"{url}/healthz").status_code == 200


def test_hits_are_answered_while_misses_wait_for_the_engine(tmp_path: Path) -> None:
    teacher = GatedTeacher()
    keep = Keep(Cache.open(tmp_path / "c", mode="r+"), KeepPolicy(k=4))
    limits = LimitSettings(max_requests_in_flight=16, max_engine_tokens=3)
    with serving_teachers(hosted("smol", teacher, keep), limits=limits) as url:
        known = {"rows": [[1, 2, 3]], "fields": {"k": 2}}
        first = threading.Thread(target=post_json, args=(url, known))
        first.start()
        until(lambda: teacher.waiting == 1)
        teacher.gate.set()
        first.join()
        teacher.gate.clear()
        # Some ask without storing, and the last joins the score of another.
        rows = [[i] * 3 for i in [*range(4, 19), 4]]
        heads = [{"cache-control": "no-store"} if i in (12, 13, 14) else {} for i in range(16)]
        misses = [
            threading.Thread(target=post_json, args=(url, {"rows": [row], "fields": {"k": 2}}), kwargs=head)
            for row, head in zip(rows, heads, strict=True)
        ]
        for miss in misses:
            miss.start()
        until(lambda: 'potstill_tokens_waiting{teacher="smol"} 42.0' in http.get(f"{url}/metrics").text)
        for _ in range(20):
            assert post_json(url, known).status_code == 200
        teacher.gate.set()
        for miss in misses:
            miss.join()


def test_a_client_that_leaves_cancels_its_work() -> None:
    teacher = GatedTeacher()
    with serving_teachers(hosted("smol", teacher)) as url:
        with asked_by_hand(url, {"rows": [[1]]}):
            until(lambda: teacher.waiting == 1)
        until(lambda: teacher.cancelled == 1)
        assert 'potstill_tokens_in_flight{teacher="smol"} 0.0' in http.get(f"{url}/metrics").text
        until(lambda: 'status="499"' in http.get(f"{url}/metrics").text)


def test_a_failing_teacher_is_reported_by_its_own_class() -> None:
    with serving_teachers(hosted("smol", BrokenTeacher(TeacherFailed("the engine\ndied")))) as url:
        assert refused(post_json(url, {"rows": [[1]]}), 502, "teacher_failed") == "the engine died"


def test_a_bug_is_logged_and_its_insides_stay_inside(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        serving_teachers(hosted("smol", BrokenTeacher(RuntimeError("secret of the engine")))) as url,
    ):
        assert "secret" not in refused(post_json(url, {"rows": [[1]]}), 500, "internal")
        assert 'potstill_refusals_total{kind="internal"} 1.0' in http.get(f"{url}/metrics").text
    tracebacks = [record for record in caplog.records if record.exc_info and "RuntimeError" in str(record.exc_info)]
    assert len(tracebacks) == 1
    assert any("/v1/teachers/smol/score" in record.getMessage() for record in caplog.records)


def test_the_service_listens_while_its_teachers_start() -> None:
    gate = threading.Event()

    @asynccontextmanager
    async def slowly() -> AsyncIterator[Teacher]:
        while not gate.is_set():  # noqa: ASYNC110  set by another thread
            await asyncio.sleep(0.01)
        yield FakeTeacher()

    app = create_app(Service([HostedTeacher("slow", slowly), hosted("smol", FakeTeacher())]))
    with serving(app) as url:
        until(lambda: http.get(f"{url}/readyz").json()["teachers"]["smol"] == "ready")
        assert http.get(f"{url}/healthz").status_code == 200
        assert http.get(f"{url}/readyz").status_code == 503
        assert post_json(url, {"rows": [[1]]}).status_code == 200
        reply = post_json(url, {"rows": [[1]]}, name="slow")
        assert "starting" in refused(reply, 503, "unavailable")
        assert "retry-after" in reply.headers
        refused(http.get(f"{url}/v1/teachers/slow"), 503, "unavailable")
        refused(http.get(f"{url}/v1/teachers/slow/replicas"), 503, "unavailable")
        assert http.get(f"{url}/v1/teachers").json()["teachers"][0] == {"name": "slow", "state": "starting"}
        gate.set()
        wait_ready(url)
