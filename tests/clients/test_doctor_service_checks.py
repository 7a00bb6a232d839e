"""The checks that `potstill doctor` makes of a service, with one in order, and really broken."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from potstill.clients.doctor.examine import Patient, examine, same_origin
from potstill.clients.doctor.findings import Finding
from potstill.clients.doctor.service_checks import check_service
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from tests.support.fakes import FakeTeacher
from tests.support.findings import PROBING, failed, levels
from tests.support.processes.servers import hosted, serving, serving_teachers


def test_a_service_that_cannot_be_reached_is_found() -> None:
    finding = failed(asyncio.run(examine(Patient(url="http://127.0.0.1:9"), PROBING)))
    assert finding.check == "service"
    assert "cannot be reached" in finding.detail


def other_service(state: str = "starting", **doctor: object) -> FastAPI:
    """A service that is not quite ours: what `/v1/doctor` says, or nothing when it is older."""
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {}

    @app.get("/v1/teachers")
    def teachers() -> dict[str, list[dict[str, str]]]:
        return {"teachers": [{"name": "smol", "state": state, "failure": "it has no weights"}]}

    @app.get("/v1/doctor")
    def facts() -> JSONResponse:
        if not doctor:
            return JSONResponse({"kind": "not_found", "detail": "GET /v1/doctor: Not Found"}, status_code=404)
        return JSONResponse(doctor)

    return app


def test_a_teacher_that_has_failed_is_a_failure_and_one_that_starts_is_not() -> None:
    [starting, broken] = [look_at_service(other_service(state))["service"] for state in ("starting", "failed")]
    assert (starting.level, starting.detail) == ("warn", "smol is starting")
    assert (broken.level, broken.detail) == ("fail", "smol has failed: it has no weights")


def look_at_service(app: FastAPI) -> dict[str, Finding]:
    with serving(app) as url:
        return {finding.check: finding for finding in asyncio.run(check_service(url))[1]}


def test_an_older_service_and_another_wire_version_are_found() -> None:
    older = look_at_service(other_service())
    assert (older["wire version"].level, older["wire version"].way_out) == ("fail", "upgrade the service")
    assert (older["service"].level, older["service"].detail) == ("warn", "smol is starting")
    newer = look_at_service(other_service(wire_version="99"))["wire version"]
    assert (newer.level, newer.way_out) == ("fail", "upgrade the older")


def test_a_service_that_may_run_out_of_memory_is_found() -> None:
    def level(available: int | None) -> str:
        memory = {"rss_bytes": 1, "available_bytes": available, "admitted_bytes": 2**32}
        return look_at_service(other_service(wire_version="1", memory=memory))["memory"].level

    assert [level(n) for n in (2**33, 2**32 - 1, 2**30, None)] == ["ok", "warn", "fail", "not run"]


@contextmanager
def service_of_another_time(seconds: float) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            import time

            return super().date_time_string((time.time() if timestamp is None else timestamp) + seconds)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (-20, "warn"), (900, "fail")])
def test_clocks_that_differ_are_found(seconds: float, level: str) -> None:
    with service_of_another_time(seconds) as url:
        clock = next(finding for finding in asyncio.run(check_service(url))[1] if finding.check == "clock")
    assert clock.level == level
    if level != "ok":
        assert ("ahead of" if seconds > 0 else "behind") in clock.detail


def test_a_service_that_others_reach_without_a_key_is_found() -> None:
    open_to_others = Access(hosts=frozenset({"0.0.0.0"}))
    with serving_teachers(hosted("smol", FakeTeacher()), access=open_to_others) as url:
        reached = url.replace("127.0.0.1", "0.0.0.0")
        access = next(finding for finding in asyncio.run(check_service(reached))[1] if finding.check == "access")
    assert (access.level, access.detail) == ("fail", "it answers others without a key")


def test_what_a_key_may_not_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_file = tmp_path / "keys.toml"
    key = add_key(keys_file, "trainer", Role.TRAINER, Quota())
    with serving_teachers(hosted("smol", FakeTeacher()), access=Access(KeyRing(keys_file))) as url:
        unknown = failed(asyncio.run(check_service(url))[1])
        assert unknown.way_out == "put a key into POTSTILL_API_KEY, or name its variable with --api-key-env"
        monkeypatch.setenv("POTSTILL_API_KEY", key)
        findings = asyncio.run(examine(Patient(url=url), PROBING))
        version = next(finding for finding in findings if finding.check == "wire version")
        assert (version.level, version.way_out) == ("warn", "use a key with the role admin")
        assert "fail" not in levels(findings).values()
        open_to_others = url.replace("127.0.0.1", "0.0.0.0")
        [access] = [finding for finding in asyncio.run(check_service(open_to_others))[1] if finding.check == "access"]
        assert (access.level, access.detail) == ("warn", "keys and rows go over the network in the clear")


@contextmanager
def stranger() -> Iterator[tuple[str, list[str | None]]]:
    """A host that knows no teacher, and the `authorization` of each request to it."""
    shown: list[str | None] = []
    app = FastAPI()

    @app.get("/{path:path}")
    def refuse(request: Request) -> JSONResponse:
        shown.append(request.headers.get("authorization"))
        return JSONResponse({"kind": "not_found", "detail": "not here"}, status_code=404)

    with serving(app) as url:
        yield url, shown


@pytest.mark.parametrize(("of_all", "shown"), [(None, None), ("everybody", "Bearer everybody")])
def test_the_key_of_the_service_is_not_shown_to_a_teacher_elsewhere(
    of_all: str | None, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of_all is None:
        monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    else:
        monkeypatch.setenv("POTSTILL_API_KEY", of_all)
    key = add_key(tmp_path / "keys.toml", "admin", Role.ADMIN, Quota())
    access = Access(KeyRing(tmp_path / "keys.toml"))
    with serving_teachers(hosted("smol", FakeTeacher()), access=access) as url, stranger() as (elsewhere, seen):
        teachers = [("there", f"{elsewhere}#x"), ("here", f"{url}#smol")]
        findings = asyncio.run(examine(Patient(url=url, api_key=key, teachers=teachers), PROBING))
        assert set(seen) == {shown}
        assert {finding.level for finding in findings if finding.subject == "here"} == {"ok", "not run"}
        seen.clear()
        asyncio.run(examine(Patient(api_key=key, teachers=teachers[:1]), PROBING))
        assert set(seen) == {f"Bearer {key}"}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("http://host:80/#x", True),
        ("http://HOST/deeper#x", True),
        ("https://host#x", False),
        ("http://host:8700#x", False),
        ("http://host@elsewhere#x", False),
        ("http://host.elsewhere#x", False),
        ("http://host:x", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(other: str, same: bool) -> None:
    assert same_origin("http://host", other) is same


def test_a_key_in_the_url_is_used_and_shown_in_no_finding(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.toml", "admin", Role.ADMIN, Quota())
    with serving_teachers(hosted("smol", FakeTeacher()), access=Access(KeyRing(tmp_path / "keys.toml"))) as url:
        open_to_others = url.replace("127.0.0.1", f"any:{key}@0.0.0.0")
        findings = asyncio.run(examine(Patient(url=open_to_others), PROBING))
    by_check = {finding.check: finding for finding in findings}
    assert by_check["wire version"].level == "ok"
    assert (by_check["access"].level, "in the clear" in by_check["access"].detail) == ("warn", True)
    assert key not in str(findings)
