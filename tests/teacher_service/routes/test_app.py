from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from potstill.cache.cache import Cache
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.cache.types import TeacherLimits
from potstill.cache.wire import scores as wire
from potstill.teacher_service.hosting.hosted_teacher import Keep
from potstill.teacher_service.settings.service import LimitSettings
from tests.support import http
from tests.support.fakes import FakeTeacher, GatedTeacher
from tests.support.processes.servers import hosted, post_json, refused, serving_teachers
from tests.support.waiting import until

ARROW = "application/vnd.apache.arrow.stream"
ROWS = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher(top_k_only=True)


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    limits = LimitSettings(max_body_bytes=100_000, max_rows=50, max_tokens_in_flight=2000, max_answer_bytes=50_000)
    with serving_teachers(hosted("smol", teacher), hosted("other", FakeTeacher()), limits=limits) as address:
        yield address


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
    return http.post(f"{url}/v1/teachers/smol/score", content=body, headers=headers)


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


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 1_000, b"\xff\xfe", b'{"rows": [[1]]} x'])
def test_what_is_not_json_is_refused(url: str, teacher: FakeTeacher, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = http.post(f"{url}/v1/teachers/smol/score", content=body, headers=headers)
    assert "JSON" in refused(reply, 422, "invalid_input")
    assert teacher.scored == []


def test_what_is_not_arrow_is_refused(url: str, teacher: FakeTeacher) -> None:
    for body in (b"nonsense", hand_built(ROWS)[:-30]):
        assert "Arrow" in refused(post_arrow(url, body), 422, "invalid_input")
    assert "potstill.fields" in refused(post_arrow(url, hand_built(ROWS, fields=b"{}}")), 422, "invalid_input")
    assert teacher.scored == []


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
        reply = http.post(f"{url}/v1/teachers/smol/score", content=b"{}", headers={"content-type": kind})
        assert ARROW in refused(reply, 415, "media_type")
    reply = post_json(url, {"rows": []}, **{"content-encoding": "gzip"})
    assert "gzip" in refused(reply, 415, "media_type")


def test_a_body_over_the_limit_is_refused_while_it_is_read(url: str) -> None:
    assert "max_body_bytes=100000" in refused(post_json(url, {"rows": [[1] * 60_000]}), 413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    reply = http.post(f"{url}/v1/teachers/smol/score", content=endless(), headers=headers)
    refused(reply, 413, "body_too_large")


def test_unknown_names_routes_and_methods_have_the_one_error_shape(url: str) -> None:
    assert "smol, other" in refused(post_json(url, {"rows": []}, name="nobody"), 404, "unknown_teacher")
    refused(http.get(f"{url}/v1/teachers/nobody"), 404, "unknown_teacher")
    refused(http.get(f"{url}/v1/nothing"), 404, "not_found")
    refused(http.get(f"{url}/docs"), 404, "not_found")
    reply = http.patch(f"{url}/v1/teachers/smol/score")
    refused(reply, 405, "invalid_input")
    assert reply.headers["allow"] == "POST"


def test_the_lists(url: str, teacher: FakeTeacher) -> None:
    assert http.get(f"{url}/healthz").json() == {"status": "ok"}
    assert http.get(f"{url}/readyz").json()["teachers"] == {"smol": "ready", "other": "ready"}
    models = http.get(f"{url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["smol", "other"]
    listed = http.get(f"{url}/v1/teachers").json()["teachers"]
    assert [entry["name"] for entry in listed] == ["smol", "other"]
    one = http.get(f"{url}/v1/teachers/smol").json()
    assert one == listed[0]
    assert one["identity"] == teacher.identity.to_json()
    assert one["provenance"] == teacher.provenance.to_json()
    assert one["limits"] == {"max_top_k": 64, "max_row_tokens": None}


def test_replicas_in_process_are_one(url: str) -> None:
    address = f"{url}/v1/teachers/smol/replicas"
    each = [{"name": "in-process", "state": "ready", "tokens_waiting": 0, "tokens_scored": 0}]
    one = {"replicas": 1, "target": 1, "max": 1, "min": 1, "each": each}
    assert http.get(address).json() == one
    assert http.put(address, json={"replicas": 1}).json() == one
    assert "Ray" in refused(http.put(address, json={"replicas": 2}), 422, "limit_exceeded")
    bodies: list[Any] = [
        {"replicas": 0},
        {"replicas": "2"},
        {"replicas": True},
        {},
        {"replicas": 1, "x": 1},
        [],
    ]
    for bad in bodies:
        refused(http.put(address, json=bad), 422, "invalid_input")
    refused(http.put(address, content=b"{"), 422, "invalid_input")


def test_limits_that_a_teacher_states_are_enforced() -> None:
    class Short(FakeTeacher):
        limits = TeacherLimits(max_top_k=8, max_row_tokens=5)

    with serving_teachers(hosted("smol", Short())) as url:
        assert post_json(url, {"rows": [[1] * 5], "fields": {"k": 8}}).status_code == 200
        assert "6 tokens" in refused(post_json(url, {"rows": [[1] * 6], "fields": {"k": 8}}), 422, "limit_exceeded")
        assert "k=9" in refused(post_json(url, {"rows": [[1]], "fields": {"k": 9}}), 422, "limit_exceeded")


def test_the_caller_may_give_a_deadline(url: str) -> None:
    teacher = GatedTeacher()
    with serving_teachers(hosted("smol", teacher)) as gated:
        reply = post_json(gated, {"rows": [[1]]}, **{"potstill-timeout": "0.1"})
        assert "0.1 seconds" in refused(reply, 504, "deadline_exceeded")
        until(lambda: teacher.cancelled == 1)
    for bad in ("soon", "0", "-1", "nan", "inf"):
        refused(post_json(url, {"rows": [[1]]}, **{"potstill-timeout": bad}), 422, "invalid_input")


def test_metrics_count_by_route_and_not_by_path(url: str) -> None:
    post_json(url, {"rows": ROWS})
    for path in ("/v1/teachers/a", "/v1/teachers/b", "/x", "/y"):
        http.get(f"{url}{path}")
    text = http.get(f"{url}/metrics").text
    assert 'potstill_scored_rows_total{teacher="smol"} 3.0' in text
    assert 'potstill_scored_tokens_total{teacher="smol"} 6.0' in text
    assert 'potstill_requests_total{method="GET",route="/v1/teachers/{name}",status="404"} 2.0' in text
    assert 'potstill_requests_total{method="GET",route="unmatched",status="404"} 2.0' in text
    assert 'potstill_request_seconds_count{route="/v1/teachers/{name}/score"} 1.0' in text
    assert 'potstill_refusals_total{kind="unknown_teacher"} 2.0' in text


def test_many_requests_at_once_each_get_their_own_answer(url: str, teacher: FakeTeacher) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=http.SECONDS, verify=http.TRUSTED) as client:
            posts = (
                client.post(f"{url}/v1/teachers/smol/score", json={"rows": [[i, i + 1]], "fields": {"k": 2}})
                for i in range(40)
            )
            return await asyncio.gather(*posts)

    for i, reply in enumerate(asyncio.run(ask())):
        expected = teacher.distribution(np.array([i, i + 1], np.uint32), 2)
        assert reply.json()["rows"][0]["ids"] == expected.ids.tolist()


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
    text = http.get(f"{cached_url}/metrics").text
    assert 'potstill_cache_rows_total{result="miss",teacher="smol"} 3.0' in text
    assert 'potstill_cache_rows_total{result="hit",teacher="smol"} 3.0' in text


def test_no_store_goes_straight_to_the_teacher(cached_url: str, teacher: FakeTeacher) -> None:
    asked = {"rows": ROWS, "fields": {"k": 8}}
    for _ in range(2):
        reply = post_json(cached_url, asked, **{"cache-control": "no-store"})
        expected = teacher.distribution(np.array(ROWS[0], np.uint32), 8)
        np.testing.assert_array_equal(np.float32(reply.json()["rows"][0]["logprobs"]), expected.logprobs)
    assert len(teacher.scored) == 6
    assert 'potstill_cache_rows_total{result="miss",teacher="smol"} 0.0' in http.get(f"{cached_url}/metrics").text
