"""Teachers that come and go over HTTP. What is added is another service's teacher: real, and up at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from potstill.cache.types import Teacher
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.service import Service
from tests.support import http
from tests.support.corpora import make_corpus
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.processes.servers import hosted, refused, serving, serving_teachers, wait_ready

ROWS = {"rows": [[1, 2, 3], [4, 5]], "fields": {"k": 3}}


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """Where the teachers `smol` and `slow` run."""
    big = FakeTeacher(fake_identity(model="big"), tokens_per_second=5.0)
    with serving_teachers(hosted("smol", FakeTeacher()), hosted("slow", big)) as url:
        yield url


@pytest.fixture
def url() -> Iterator[str]:
    with serving_teachers(hosted("own", FakeTeacher())) as url:
        yield url


def teachers(url: str) -> dict[str, Any]:
    return {one["name"]: one for one in http.get(f"{url}/v1/teachers").json()["teachers"]}


def score(url: str, name: str) -> httpx.Response:
    return http.post(f"{url}/v1/teachers/{name}/score", json=ROWS)


def gone(url: str, name: str) -> bool:
    deadline = time.monotonic() + 300
    while name in teachers(url) and time.monotonic() < deadline:
        time.sleep(0.02)
    return name not in teachers(url)


def test_a_teacher_is_added_used_and_removed(url: str, origin: str) -> None:
    added = http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#smol"})
    assert added.status_code == 201
    assert added.json()["identity"]["model"] == "fake"
    assert list(teachers(url)) == ["own", "mirror"]
    assert score(url, "mirror").json()["rows"] == score(url, "own").json()["rows"]
    assert [one["id"] for one in http.get(f"{url}/v1/models").json()["data"]] == ["own", "mirror"]
    removed = http.delete(f"{url}/v1/teachers/mirror")
    assert (removed.status_code, removed.json()) == (202, {"name": "mirror", "state": "draining"})
    assert gone(url, "mirror")
    refused(score(url, "mirror"), 404, "unknown_teacher")
    refused(http.delete(f"{url}/v1/teachers/mirror"), 404, "unknown_teacher")


def test_the_same_teacher_twice_is_one_and_another_is_refused(url: str, origin: str) -> None:
    body = {"model": f"{origin}#smol", "options": {"timeout": 9}}
    assert http.put(f"{url}/v1/teachers/mirror", json=body).status_code == 201
    assert http.put(f"{url}/v1/teachers/mirror", json=body).status_code == 200
    other = http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#slow", "options": {"timeout": 9}})
    assert "is there with another model; remove it" in refused(other, 409, "spec_mismatch")
    other = http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#smol"})
    assert "another options" in refused(other, 409, "spec_mismatch")
    refused(http.put(f"{url}/v1/teachers/own", json=body), 409, "spec_mismatch")
    http.delete(f"{url}/v1/teachers/mirror")
    assert gone(url, "mirror")
    assert http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#slow"}).status_code == 201


def test_what_cannot_be_added_is_not_there(url: str, origin: str) -> None:
    bodies: list[Any] = [
        {"model": f"{origin}#nobody"},
        {"model": f"{origin}#smol", "options": {"speed": 3}},
        {"model": "ftp://elsewhere/model"},
        {"model": f"{origin}#smol", "replicas": 2},
        {"model": f"{origin}#smol", "replicas": 0},
        {"model": f"{origin}#smol", "replicas": 3, "max_replicas": 2},
        {"model": f"{origin}#smol", "autoscale": {"min": 3, "max": 2, "tokens_per_replica": 100}},
        {"model": ""},
        {"options": {}},
        {"model": f"{origin}#smol", "colour": "red"},
        ["model"],
    ]
    for body in bodies:
        answer = http.put(f"{url}/v1/teachers/mirror", json=body)
        assert answer.status_code in (404, 422), body
        assert "\n" not in answer.json()["detail"]
        assert list(teachers(url)) == ["own"]
    assert http.put(f"{url}/v1/teachers/.mirror", json={"model": f"{origin}#smol"}).status_code == 422
    assert http.get(f"{url}/readyz").status_code == 200


def test_calls_in_flight_end_before_a_removed_teacher_does(url: str, origin: str) -> None:
    http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#slow"})
    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(score, url, "mirror") for _ in range(2)]
        while http.get(f"{origin}/v1/teachers/slow/replicas").json()["each"][0]["tokens_waiting"] < 10:
            time.sleep(0.01)
        assert http.delete(f"{url}/v1/teachers/mirror").status_code == 202
        assert http.delete(f"{url}/v1/teachers/mirror").status_code == 202
        assert teachers(url)["mirror"]["state"] == "draining"
        refused(score(url, "mirror"), 503, "unavailable")
        again = http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#smol"})
        assert "is being removed" in refused(again, 503, "unavailable")
        assert http.get(f"{url}/readyz").status_code == 200
        assert [call.result().status_code for call in calls] == [200, 200]
    assert gone(url, "mirror")


def test_without_teachers_a_service_is_ready_only_where_a_cache_can_be_served(
    url: str, origin: str, tmp_path: Path
) -> None:
    assert http.delete(f"{url}/v1/teachers/own").status_code == 202
    assert gone(url, "own")
    answer = http.get(f"{url}/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert "potstill teachers add" in answer.json()["detail"]
    http.put(f"{url}/v1/teachers/mirror", json={"model": f"{origin}#smol"})
    assert http.get(f"{url}/readyz").json() == {"status": "ready", "teachers": {"mirror": "ready"}}
    cache, _ = make_corpus(tmp_path / "cache")
    with serving_teachers(cache=cache) as reading:
        answer = http.get(f"{reading}/readyz")
        assert (answer.status_code, answer.json()["teachers"]) == (200, {})
        assert "what the cache has committed" in answer.json()["detail"]
        assert http.get(f"{reading}/v1/overview").json()["ready"]
        assert [corpus["name"] for corpus in http.get(f"{reading}/v1/corpora").json()["corpora"]] == ["docs"]


@asynccontextmanager
async def never_opens() -> AsyncIterator[Teacher]:
    raise OSError("no memory left")
    yield FakeTeacher()


def test_a_failed_teacher_tells_why_and_can_be_put_in_its_place(origin: str) -> None:
    with serving(create_app(Service([HostedTeacher("broken", never_opens), hosted("own", FakeTeacher())]))) as url:
        deadline = time.monotonic() + 300
        while http.get(f"{url}/readyz").json()["teachers"] != {"broken": "failed", "own": "ready"}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        answer = http.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["failures"]) == (503, {"broken": "OSError: no memory left"})
        assert teachers(url)["broken"]["failure"] == "OSError: no memory left"
        assert http.put(f"{url}/v1/teachers/broken", json={"model": f"{origin}#smol"}).status_code == 201
        wait_ready(url)
        assert "failure" not in teachers(url)["broken"]


def test_replicas_and_limits_for_autoscaling_are_not_mixed(url: str) -> None:
    address = f"{url}/v1/teachers/own/replicas"
    limits = {"max": 2, "tokens_per_replica": 100}
    bodies: list[dict[str, Any]] = [{}, {"autoscale": None}, {"replicas": 1, "autoscale": limits}]
    for body in bodies:
        assert "either replicas" in refused(http.put(address, json=body), 422, "invalid_input")
    assert "Ray" in refused(http.put(address, json={"autoscale": limits}), 422, "limit_exceeded")
    assert http.put(address, json={"replicas": 1, "autoscale": None}).json()["target"] == 1


def test_settings_are_small(url: str) -> None:
    path = f"{url}/v1/teachers/mirror"
    many = {"model": "m", **dict.fromkeys(map(str, range(20_000)), 1)}
    assert "64 KiB" in refused(http.put(path, json=many), 413, "body_too_large")
    unknown = refused(http.put(path, json={"model": "m", "u:SECRET@h" + "x" * 5000: 1}), 422, "invalid_input")
    assert len(unknown) < 1100
    assert "SECRET" not in unknown
