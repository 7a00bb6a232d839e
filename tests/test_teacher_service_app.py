from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from cache import Fields, Targets, wire
from cache.cache import Cache
from cache.cached import KeepPolicy
from cache.errors import InvalidInput, TeacherFailed, Unavailable
from cache.types import Teacher, TeacherLimits, Tokens
from teacher_service.app import create_app
from teacher_service.hosted import HostedTeacher, Keep
from teacher_service.replicas import LocalPool
from teacher_service.service import Service
from teacher_service.settings import LimitSettings
from tests.fakes import FakeTeacher
from tests.servers import hosted, opens, serving, serving_teachers, wait_ready

ARROW = "application/vnd.apache.arrow.stream"
ROWS = [[1, 2, 3], [4, 5], [6]]


class GatedTeacher(FakeTeacher):
    """Waits in `score` until it is let go; counts who waits and who was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = 0
        self.cancelled = 0

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        self.waiting += 1
        try:
            while not self.gate.is_set():  # noqa: ASYNC110  set by another thread
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return await super().score(rows, want)


class BrokenTeacher(FakeTeacher):
    """Raises what it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        raise self.error


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher(top_k_only=True)


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    limits = LimitSettings(max_body_bytes=100_000, max_rows=50, max_tokens_in_flight=2000, max_answer_bytes=50_000)
    with serving_teachers(hosted("smol", teacher), hosted("other", FakeTeacher()), limits=limits) as address:
        yield address


def refused(reply: httpx.Response, status: int, kind: str) -> str:
    """Check the one error shape; returns the detail."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"kind", "detail"}
    assert body["kind"] == kind
    assert "\n" not in body["detail"]
    return str(body["detail"])


def post_json(url: str, value: Any, *, name: str = "smol", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/teachers/{name}/score", json=value, headers=headers)


def hand_built(rows: list[list[int]], *, version: bytes = b"1", fields: bytes = b'{"k": 4}') -> bytes:
    """A request made with plain pyarrow, as a client in another language would."""
    metadata = {b"potstill.format": version, b"potstill.fields": fields}
    schema = pa.schema([pa.field("row", pa.list_(pa.uint32()))], metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(rows, pa.list_(pa.uint32()))], schema=schema))
    body: bytes = sink.getvalue().to_pybytes()
    return body


def post_arrow(url: str, body: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": ARROW, **headers}
    return httpx.post(f"{url}/v1/teachers/smol/score", content=body, headers=headers)


def test_json_in_json_out(url: str, teacher: FakeTeacher) -> None:
    reply = post_json(url, {"rows": ROWS, "fields": {"k": 4}})
    assert reply.status_code == 200
    body = reply.json()
    assert body["identity"] == teacher.identity.to_json()
    for row, got in zip(ROWS, body["rows"], strict=True):
        expected = teacher.distribution(np.array(row, np.uint32), 4)
        assert got["ids"] == expected.ids.tolist()
        np.testing.assert_array_equal(np.array(got["logprobs"], np.float32), expected.logprobs)
        assert got["label_logprob"][-1] is None


def test_hand_built_arrow_in_arrow_out(url: str, teacher: FakeTeacher) -> None:
    reply = post_arrow(url, hand_built(ROWS))
    assert reply.status_code == 200
    assert reply.headers["content-type"] == ARROW
    with pa.ipc.open_stream(reply.content) as reader:
        metadata = reader.schema.metadata
        batches = list(reader)
    assert metadata[b"potstill.format"] == b"1"
    assert json.loads(metadata[b"potstill.identity"]) == teacher.identity.to_json()
    assert [batch.num_rows for batch in batches] == [3, 2, 1]
    assert batches[0].schema.names == ["ids", "logprobs", "log_tail", "label_logprob"]
    expected = teacher.distribution(np.array(ROWS[0], np.uint32), 4)
    assert batches[0]["ids"].to_pylist() == expected.ids.tolist()


def test_accept_chooses_the_answer(url: str) -> None:
    assert post_arrow(url, hand_built(ROWS), accept="application/json").json()["rows"][2]["ids"]
    reply = post_json(url, {"rows": ROWS}, accept=f"text/html, {ARROW};q=0.9")
    assert reply.headers["content-type"] == ARROW
    assert len(wire.answer_from_arrow(reply.content).targets) == 3


def test_no_rows_are_answered_and_an_empty_row_is_refused(url: str) -> None:
    assert post_json(url, {"rows": []}).json()["rows"] == []
    assert post_arrow(url, hand_built([])).status_code == 200
    assert "row 1 is empty" in refused(post_json(url, {"rows": [[1], []]}), 422, "invalid_input")


@pytest.mark.parametrize(
    ("value", "status", "kind", "words"),
    [
        ([], 422, "invalid_input", "JSON object"),
        ({"rows": [[1]], "topk": 3}, 422, "invalid_input", "'topk'"),
        ({"rows": [[1]], "fields": {"top": 3}}, 422, "invalid_input", "'top'"),
        ({"rows": [[-1]]}, 422, "invalid_input", "rows[0]"),
        ({"rows": [[64]]}, 422, "limit_exceeded", "vocabulary of 64"),
        ({"rows": [[1]], "fields": {"k": 65}}, 422, "limit_exceeded", "k=65"),
        ({"rows": [[1]], "fields": {"k": 10**30}}, 422, "limit_exceeded", "64"),
        ({"rows": [], "fields": {"k": 10**30}}, 422, "limit_exceeded", "64"),
        ({"rows": [[1]] * 51}, 422, "limit_exceeded", "max_rows=50"),
        ({"rows": [[1] * 2001], "fields": {"k": 1}}, 422, "limit_exceeded", "max_tokens_in_flight=2000"),
        ({"rows": [[1] * 200], "fields": {"k": 64}}, 422, "limit_exceeded", "max_answer_bytes=50000"),
        ({"rows": [[1] * 200], "fields": {"k": 0, "dense": True}}, 422, "limit_exceeded", "max_answer_bytes=50000"),
        ({"rows": [[1] * 200], "fields": {"k": 0, "draws": 99}}, 422, "limit_exceeded", "max_answer_bytes=50000"),
        ({"rows": [[1]], "fields": {"k": 0}}, 422, "invalid_input", "nothing"),
        ({"rows": [[1]], "fields": {"dense": True}}, 422, "unsupported_field", "dense"),
    ],
)
def test_bad_json_is_refused_in_one_line(url: str, value: Any, status: int, kind: str, words: str) -> None:
    assert words in refused(post_json(url, value), status, kind)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 90_000, b"\xff\xfe", b'{"rows": [[1]]} x'])
def test_what_is_not_json_is_refused(url: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{url}/v1/teachers/smol/score", content=body, headers=headers)
    refused(reply, 422, "invalid_input")


def test_what_is_not_arrow_is_refused(url: str) -> None:
    refused(post_arrow(url, b"nonsense"), 422, "invalid_input")
    refused(post_arrow(url, hand_built(ROWS)[:-30]), 422, "invalid_input")
    refused(post_arrow(url, hand_built(ROWS, fields=b"{}}")), 422, "invalid_input")


def test_a_header_of_another_wire_version_is_refused_whatever_the_body(url: str) -> None:
    newer = {"potstill-format": "2"}
    for reply in (post_json(url, {"rows": ROWS}, **newer), post_arrow(url, hand_built(ROWS), **newer)):
        detail = refused(reply, 400, "wire_version")
        assert "'2'" in detail
        assert "'1'" in detail
    assert post_json(url, {"rows": ROWS}, **{"potstill-format": "1"}).status_code == 200


def test_another_wire_version_is_refused_naming_both(url: str) -> None:
    for version in (b"0", b"2"):
        detail = refused(post_arrow(url, hand_built(ROWS, version=version)), 400, "wire_version")
        assert repr(version.decode()) in detail
        assert "'1'" in detail


def test_another_content_type_is_refused(url: str) -> None:
    for kind in ("text/plain", "application/octet-stream", ""):
        reply = httpx.post(f"{url}/v1/teachers/smol/score", content=b"{}", headers={"content-type": kind})
        assert ARROW in refused(reply, 415, "media_type")
    reply = post_json(url, {"rows": []}, **{"content-encoding": "gzip"})
    assert "gzip" in refused(reply, 415, "media_type")


def test_a_body_over_the_limit_is_refused_while_it_is_read(url: str) -> None:
    assert "max_body_bytes=100000" in refused(post_json(url, {"rows": [[1] * 60_000]}), 413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{url}/v1/teachers/smol/score", content=endless(), headers=headers)
    refused(reply, 413, "body_too_large")


def test_unknown_names_routes_and_methods_have_the_one_error_shape(url: str) -> None:
    assert "smol, other" in refused(post_json(url, {"rows": []}, name="nobody"), 404, "unknown_teacher")
    refused(httpx.get(f"{url}/v1/teachers/nobody"), 404, "unknown_teacher")
    refused(httpx.get(f"{url}/v1/nothing"), 404, "not_found")
    refused(httpx.get(f"{url}/docs"), 404, "not_found")
    reply = httpx.patch(f"{url}/v1/teachers/smol/score")
    refused(reply, 405, "invalid_input")
    assert reply.headers["allow"] == "POST"


def test_the_lists(url: str, teacher: FakeTeacher) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").json()["teachers"] == {"smol": "ready", "other": "ready"}
    models = httpx.get(f"{url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["smol", "other"]
    listed = httpx.get(f"{url}/v1/teachers").json()["teachers"]
    assert [entry["name"] for entry in listed] == ["smol", "other"]
    one = httpx.get(f"{url}/v1/teachers/smol").json()
    assert one == listed[0]
    assert one["identity"] == teacher.identity.to_json()
    assert one["provenance"] == teacher.provenance.to_json()
    assert one["limits"] == {"max_top_k": 64, "max_row_tokens": None}


def test_replicas_in_process_are_one(url: str) -> None:
    address = f"{url}/v1/teachers/smol/replicas"
    each = [{"name": "in-process", "state": "ready", "tokens_waiting": 0, "tokens_scored": 0}]
    one = {"replicas": 1, "target": 1, "max": 1, "min": 1, "each": each}
    assert httpx.get(address).json() == one
    assert httpx.put(address, json={"replicas": 1}).json() == one
    assert "Ray" in refused(httpx.put(address, json={"replicas": 2}), 422, "limit_exceeded")
    bodies: list[Any] = [
        {"replicas": 0},
        {"replicas": "2"},
        {"replicas": True},
        {},
        {"replicas": 1, "x": 1},
        [],
    ]
    for bad in bodies:
        refused(httpx.put(address, json=bad), 422, "invalid_input")
    refused(httpx.put(address, content=b"{"), 422, "invalid_input")


def test_limits_that_a_teacher_states_are_enforced() -> None:
    class Short(FakeTeacher):
        limits = TeacherLimits(max_top_k=8, max_row_tokens=5)

    with serving_teachers(hosted("smol", Short())) as url:
        assert post_json(url, {"rows": [[1] * 5], "fields": {"k": 8}}).status_code == 200
        assert "6 tokens" in refused(post_json(url, {"rows": [[1] * 6], "fields": {"k": 8}}), 422, "limit_exceeded")
        assert "k=9" in refused(post_json(url, {"rows": [[1]], "fields": {"k": 9}}), 422, "limit_exceeded")


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
        assert 'potstill_tokens_in_flight{teacher="smol"} 6.0' in httpx.get(f"{url}/metrics").text
        teacher.gate.set()
        first.join()
        assert post_json(url, {"rows": [[1] * 10]}).status_code == 200
        assert 'potstill_tokens_in_flight{teacher="smol"} 0.0' in httpx.get(f"{url}/metrics").text


def test_requests_over_the_bound_are_told_to_come_back() -> None:
    with serving_teachers(hosted("smol", FakeTeacher()), limits=LimitSettings(max_requests_in_flight=1)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as first:
            head = "POST /v1/teachers/smol/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            first.sendall(f"{head}content-length: 100\r\n\r\n".encode())
            until(lambda: "potstill_requests_in_flight 1.0" in httpx.get(f"{url}/metrics").text)
            refused(post_json(url, {"rows": [[1]]}), 429, "overloaded")
            assert httpx.get(f"{url}/healthz").status_code == 200


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
        until(lambda: 'potstill_tokens_waiting{teacher="smol"} 42.0' in httpx.get(f"{url}/metrics").text)
        for _ in range(20):
            assert post_json(url, known).status_code == 200
        teacher.gate.set()
        for miss in misses:
            miss.join()


def test_a_client_that_leaves_cancels_its_work() -> None:
    teacher = GatedTeacher()
    with serving_teachers(hosted("smol", teacher)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/teachers/smol/score", json={"rows": [[1]]}, timeout=0.3)
        until(lambda: teacher.cancelled == 1)
        assert 'potstill_tokens_in_flight{teacher="smol"} 0.0' in httpx.get(f"{url}/metrics").text
        until(lambda: 'status="499"' in httpx.get(f"{url}/metrics").text)


def test_the_caller_may_give_a_deadline(url: str) -> None:
    teacher = GatedTeacher()
    with serving_teachers(hosted("smol", teacher)) as gated:
        reply = post_json(gated, {"rows": [[1]]}, **{"potstill-timeout": "0.1"})
        assert "0.1 seconds" in refused(reply, 504, "deadline_exceeded")
        until(lambda: teacher.cancelled == 1)
    for bad in ("soon", "0", "-1", "nan", "inf"):
        refused(post_json(url, {"rows": [[1]]}, **{"potstill-timeout": bad}), 422, "invalid_input")


def test_a_failing_teacher_is_reported_by_its_own_class() -> None:
    with serving_teachers(hosted("smol", BrokenTeacher(TeacherFailed("the engine\ndied")))) as url:
        assert refused(post_json(url, {"rows": [[1]]}), 502, "teacher_failed") == "the engine died"


def test_a_bug_is_logged_and_its_insides_stay_inside(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        serving_teachers(hosted("smol", BrokenTeacher(RuntimeError("secret of the engine")))) as url,
    ):
        assert "secret" not in refused(post_json(url, {"rows": [[1]]}), 500, "internal")
        assert 'potstill_refusals_total{kind="internal"} 1.0' in httpx.get(f"{url}/metrics").text
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

    app = create_app(Service.of([HostedTeacher("slow", slowly), hosted("smol", FakeTeacher())]))
    with serving(app) as url:
        until(lambda: httpx.get(f"{url}/readyz").json()["teachers"]["smol"] == "ready")
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert post_json(url, {"rows": [[1]]}).status_code == 200
        reply = post_json(url, {"rows": [[1]]}, name="slow")
        assert "starting" in refused(reply, 503, "unavailable")
        assert "retry-after" in reply.headers
        refused(httpx.get(f"{url}/v1/teachers/slow"), 503, "unavailable")
        refused(httpx.get(f"{url}/v1/teachers/slow/replicas"), 503, "unavailable")
        assert httpx.get(f"{url}/v1/teachers").json()["teachers"][0] == {"name": "slow", "state": "starting"}
        gate.set()
        wait_ready(url)


def test_metrics_count_by_route_and_not_by_path(url: str) -> None:
    post_json(url, {"rows": ROWS})
    for path in ("/v1/teachers/a", "/v1/teachers/b", "/x", "/y"):
        httpx.get(f"{url}{path}")
    text = httpx.get(f"{url}/metrics").text
    assert 'potstill_scored_rows_total{teacher="smol"} 3.0' in text
    assert 'potstill_scored_tokens_total{teacher="smol"} 6.0' in text
    assert 'potstill_requests_total{method="GET",route="/v1/teachers/{name}",status="404"} 2.0' in text
    assert 'potstill_requests_total{method="GET",route="unmatched",status="404"} 2.0' in text
    assert 'potstill_request_seconds_count{route="/v1/teachers/{name}/score"} 1.0' in text
    assert 'potstill_refusals_total{kind="unknown_teacher"} 2.0' in text


def test_many_requests_at_once_each_get_their_own_answer(url: str, teacher: FakeTeacher) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient() as client:
            posts = (
                client.post(f"{url}/v1/teachers/smol/score", json={"rows": [[i, i + 1]], "fields": {"k": 2}})
                for i in range(40)
            )
            return await asyncio.gather(*posts)

    for i, reply in enumerate(asyncio.run(ask())):
        expected = teacher.distribution(np.array([i, i + 1], np.uint32), 2)
        assert reply.json()["rows"][0]["ids"] == expected.ids.tolist()


async def test_a_teacher_that_does_not_start_says_so() -> None:
    @asynccontextmanager
    async def failing(error: Exception) -> AsyncIterator[Teacher]:
        raise error
        yield

    for error, cls, words in (
        (RuntimeError("no memory"), TeacherFailed, "RuntimeError: no memory"),
        (InvalidInput("bad option"), InvalidInput, "bad option"),
    ):
        teacher = HostedTeacher("smol", lambda error=error: failing(error))  # type: ignore[misc]
        teacher.start()
        with pytest.raises(cls, match=f"'smol' did not start.*{words}"):
            await teacher.settled()
        assert teacher.state == "failed"
        with pytest.raises(Unavailable, match="failed"):
            _ = teacher.pool
        await teacher.stop()


async def test_a_start_that_is_under_way_is_given_up() -> None:
    closed = []

    @asynccontextmanager
    async def never() -> AsyncIterator[Teacher]:
        try:
            await asyncio.Event().wait()
            yield FakeTeacher()
        finally:
            closed.append(True)

    teacher = HostedTeacher("smol", never)
    teacher.start()
    await asyncio.sleep(0)
    waiting = asyncio.create_task(teacher.settled())
    await asyncio.sleep(0)
    await teacher.stop()
    assert closed == [True]
    with pytest.raises(Unavailable, match="stopped before"):
        await waiting


async def test_what_goes_wrong_while_closing_is_raised_after_all_are_closed() -> None:
    closed = []

    def opening(name: str) -> Callable[[], AbstractAsyncContextManager[Teacher]]:
        @asynccontextmanager
        async def open_it() -> AsyncIterator[Teacher]:
            yield FakeTeacher()
            closed.append(name)
            raise TeacherFailed(f"{name} does not close")

        return open_it

    service = Service.of([HostedTeacher(name, opening(name)) for name in ("a", "b")])
    with pytest.raises(TeacherFailed, match="a does not close"):
        async with service.running():
            await service.started()
    assert sorted(closed) == ["a", "b"]


async def test_a_pool_is_a_teacher(teacher: FakeTeacher) -> None:
    async with LocalPool.open(opens(teacher)) as pool:
        assert (pool.identity, pool.provenance) == (teacher.identity, teacher.provenance)
        row = np.arange(5, dtype=np.uint32)
        (targets,) = await pool.score([row], Fields(k=3))
    np.testing.assert_array_equal(targets.ids, teacher.distribution(row, 3).ids)


@pytest.fixture
def cached_url(teacher: FakeTeacher, tmp_path: Path) -> Iterator[str]:
    cache = Cache.open(tmp_path / "cache", mode="r+")
    keep = Keep(cache, KeepPolicy(k=32, encoding="u8"))
    with serving_teachers(hosted("smol", teacher, keep), cache=cache) as url:
        yield url


def test_a_row_is_scored_once_and_then_kept(cached_url: str, teacher: FakeTeacher) -> None:
    asked = {"rows": ROWS, "fields": {"k": 8}}
    first, second = post_json(cached_url, asked), post_json(cached_url, asked)
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    assert len(teacher.scored) == 3
    text = httpx.get(f"{cached_url}/metrics").text
    assert 'potstill_cache_rows_total{result="miss",teacher="smol"} 3.0' in text
    assert 'potstill_cache_rows_total{result="hit",teacher="smol"} 3.0' in text


def test_no_store_goes_straight_to_the_teacher(cached_url: str, teacher: FakeTeacher) -> None:
    asked = {"rows": ROWS, "fields": {"k": 8}}
    for _ in range(2):
        reply = post_json(cached_url, asked, **{"cache-control": "no-store"})
        expected = teacher.distribution(np.array(ROWS[0], np.uint32), 8)
        np.testing.assert_array_equal(np.float32(reply.json()["rows"][0]["logprobs"]), expected.logprobs)
    assert len(teacher.scored) == 6
    assert 'potstill_cache_rows_total{result="miss",teacher="smol"} 0.0' in httpx.get(f"{cached_url}/metrics").text
