from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from potstill.cache.errors import InvalidInput, Unauthenticated
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.clients.retry import RetryPolicy
from potstill.teacher_service.access.audit import Audit, AuditLine, detail_of
from potstill.teacher_service.access.auth import Role, allow
from potstill.teacher_service.access.keys_file import add_key, new_key
from potstill.teacher_service.access.middleware import OPEN_PATHS, Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import AccessSettings
from tests.support import http
from tests.support.command_line import refused as refused_command, run
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, refused, serving_teachers
from tests.support.waiting import until

ASKED = {"rows": [[1, 2, 3]], "fields": {"k": 2}}


@dataclass
class Guarded:
    """A service with keys, and one key of each role."""

    url: str
    file: Path
    audit: Path
    engine: FakeTeacher
    keys: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys.get(key, key)}"}
        return http.request(method, f"{self.url}{path}", headers=headers, **options)

    def score(self, key: str | None) -> httpx.Response:
        return self.call("POST", "/v1/teachers/smol/score", key, json=ASKED)

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    file, audit = tmp_path / "keys.toml", tmp_path / "audit.jsonl"
    keys = {role.value: add_key(file, role.value, role, Quota()) for role in Role}
    access = Access.of(AccessSettings(keys_file=str(file), audit_file=str(audit)))
    engine = FakeTeacher()
    with serving_teachers(hosted("smol", engine), access=access) as url:
        yield Guarded(url, file, audit, engine, keys)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/models"),
        ("GET", "/v1/overview"),
        ("GET", "/v1/teachers"),
        ("GET", "/v1/teachers/smol"),
        ("GET", "/v1/teachers/nobody"),
        ("GET", "/v1/corpora"),
        ("GET", "/v1/nothing"),
        ("GET", "/healthz/../v1/teachers"),
        ("GET", "//healthz"),
        ("POST", "/v1/teachers/smol/score"),
        ("PUT", "/v1/teachers/smol/replicas"),
        ("DELETE", "/v1/teachers/smol"),
    ],
)
def test_without_a_known_key_nothing_is_told(guarded: Guarded, method: str, path: str) -> None:
    for key, words in ((None, "Authorization: Bearer"), ("wrong", "not known"), (new_key(), "not known")):
        reply = guarded.call(method, path, key)
        assert words in refused(reply, 401, "unauthenticated")
        assert reply.headers["www-authenticate"].startswith("Bearer")
    assert guarded.engine.scored == []


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer -", "Basic {key}", "{key}", "Bearer  {key}x", "Token {key}"])
def test_what_is_no_bearer_key_is_refused(guarded: Guarded, header: str) -> None:
    text = header.format(key=guarded.keys["admin"])
    reply = http.get(f"{guarded.url}/v1/teachers", headers={"authorization": text})
    unknown = header in ("Bearer -", "Bearer  {key}x")
    assert ("not known" if unknown else "Authorization: Bearer") in refused(reply, 401, "unauthenticated")
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert guarded.keys["admin"] not in reply.text


def test_health_and_the_empty_page_are_for_everybody(guarded: Guarded) -> None:
    for path in ("/healthz", "/readyz", "/health", "/"):
        assert guarded.call("GET", path).status_code == 200
        assert guarded.call("GET", path, "wrong").status_code == 200


def test_each_role_may_do_what_the_ones_before_it_may(guarded: Guarded) -> None:
    for key in ("trainer", "batch", "admin"):
        assert guarded.score(key).status_code == 200
        for path in ("/v1/teachers", "/v1/corpora", "/metrics", "/v1/overview"):
            assert guarded.call("GET", path, key).status_code == 200
    put = {"replicas": 1}
    for key in ("trainer", "batch"):
        for method, path in (("PUT", "/v1/teachers/smol/replicas"), ("DELETE", "/v1/teachers/smol")):
            reply = guarded.call(method, path, key, json=put)
            detail = refused(reply, 403, "forbidden")
            assert detail == f"this needs the role admin; the key {key!r} has the role {key}"
    assert guarded.call("PUT", "/v1/teachers/smol/replicas", "admin", json=put).status_code == 200


def test_every_route_declares_the_role_it_needs() -> None:
    app = create_app(Service([hosted("smol", FakeTeacher())]))
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) > 10
    silent = set()
    for route in routes:
        roles = [needed.dependency.role for needed in route.dependencies if isinstance(needed.dependency, allow)]
        if not roles:
            silent.add(route.path)
        elif route.methods & {"PUT", "DELETE"}:
            assert roles != [Role.TRAINER], route.path
    # The last ones need a key all the same, unless settings say otherwise; they are not opened by a role.
    assert silent == {*OPEN_PATHS, "/static/{name}", "/metrics", "/v1/teachers/{name}/health"}


def test_metrics_can_be_opened(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "a", Role.ADMIN, Quota())
    access = Access.of(AccessSettings(keys_file=str(file), open_metrics=True))
    with serving_teachers(hosted("smol", FakeTeacher()), access=access) as url:
        assert http.get(f"{url}/metrics").status_code == 200
        assert http.get(f"{url}/v1/teachers").status_code == 401
        text = http.get(f"{url}/metrics").text
        assert 'potstill_refusals_total{kind="unauthenticated"} 1.0' in text


def test_what_admins_do_and_what_others_try_is_written_down(guarded: Guarded) -> None:
    path = "/v1/teachers/smol/replicas"
    sent = {"x-request-id": "r-1", "authorization": f"Bearer {guarded.keys['admin']}"}
    http.put(f"{guarded.url}{path}", json={"replicas": 1}, headers=sent)
    guarded.call("PUT", path, "admin", json={"replicas": 5})
    guarded.call("PUT", path, "trainer", json={"replicas": 1})
    guarded.call("PUT", path, None, json={"replicas": 1})
    guarded.call("PUT", path, "admin", content=b"{")
    for method, other in (("GET", path), ("POST", "/v1/teachers/smol/score"), ("GET", "/v1/teachers")):
        guarded.call(method, other, "admin", json=ASKED)
    lines = guarded.audited()
    assert [(line["caller"], line["status"]) for line in lines] == [
        ("admin", 200),
        ("admin", 422),
        ("trainer", 403),
        ("", 401),
        ("admin", 422),
    ]
    assert {line["action"] for line in lines} == {"PUT /v1/teachers/{name}/replicas"}
    assert {line["target"] for line in lines} == {path}
    assert lines[0]["detail"] == {"replicas": 1}
    assert lines[0]["request_id"] == "r-1"
    assert lines[4]["detail"] == "1 bytes that are not JSON"
    assert stat.S_IMODE(guarded.audit.stat().st_mode) == 0o600
    assert guarded.keys["admin"] not in guarded.audit.read_text()


def test_who_has_no_key_cannot_fill_the_disk(guarded: Guarded) -> None:
    for _ in range(20):
        guarded.call("DELETE", "/v1/teachers/smol")
    assert len(guarded.audited()) < 10


def test_secrets_in_what_an_admin_sends_are_not_written_down() -> None:
    body = json.dumps({"options": {"api_key": "s3cret", "k": 3, "list": [{"Token": "s3cret"}]}, "long": "x" * 9999})
    kept = detail_of(body.encode())
    assert "s3cret" not in json.dumps(kept)
    assert isinstance(kept, dict)
    assert kept["options"] == {"api_key": "...", "k": 3, "list": [{"Token": "..."}]}
    assert len(json.dumps(kept)) < 1000
    assert detail_of(b"x" * 100_000) == "100000 bytes"
    assert detail_of(b"") is None


async def test_without_a_file_the_audit_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    line = AuditLine(caller="a", action="PUT /x", target="/x", detail=None, status=200, request_id="r")
    with caplog.at_level(logging.INFO, logger="potstill.audit"):
        await Audit().record(line)
    assert json.loads(caplog.messages[0])["action"] == "PUT /x"


async def test_an_audit_file_that_breaks_loses_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidInput, match="choose another audit_file"):
        Audit(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    audit = Audit(folder / "audit")
    (folder / "audit").unlink()
    folder.rmdir()
    await audit.record(AuditLine(caller="a", action="PUT /x", target="/x", detail=None, status=200, request_id="r"))
    assert '"action": "PUT /x"' in caplog.text


def test_a_quota_is_429_with_the_time_to_come_back(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "small", Role.TRAINER, Quota(tokens_per_minute=6))
    with serving_teachers(hosted("smol", FakeTeacher()), access=Access.of(AccessSettings(keys_file=str(file)))) as url:
        headers = {"authorization": f"Bearer {key}"}
        address = f"{url}/v1/teachers/smol/score"
        assert http.post(address, json={"rows": [[1, 2, 3, 4, 5, 6]]}, headers=headers).status_code == 200
        reply = http.post(address, json={"rows": [[1, 2, 3]]}, headers=headers)
        assert "tokens_per_minute=6 of the key 'small'" in refused(reply, 429, "overloaded")
        assert 25 <= int(reply.headers["retry-after"]) <= 30


def test_a_client_sends_the_key_it_is_given_or_that_of_the_environment(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = RetryPolicy(attempts=1)
    with pytest.raises(Unauthenticated, match="Authorization: Bearer"), SyncHttpTeacher(guarded.url, "smol"):
        pass
    with SyncHttpTeacher(guarded.url, "smol", api_key=guarded.keys["trainer"]) as teacher:
        assert teacher.identity == guarded.engine.identity
    monkeypatch.setenv("POTSTILL_API_KEY", guarded.keys["trainer"] + "\n")
    with SyncHttpTeacher(guarded.url, "smol", retry=once) as teacher:
        assert teacher.identity == guarded.engine.identity
    capsys.readouterr()
    assert run("teachers", "list", "--url", guarded.url, "--json") == 0
    assert '"smol"' in capsys.readouterr().out
    line = refused_command(capsys, "teachers", "scale", "smol", "1", "--url", guarded.url)
    assert line == "forbidden: this needs the role admin; the key 'trainer' has the role trainer"
    for bad in ("a\nb", "schlüssel", "   "):
        teacher = SyncHttpTeacher(guarded.url, "smol", api_key=bad)
        with pytest.raises(InvalidInput, match="as `potstill keys add` printed it") as caught, teacher:
            pass
        assert bad.strip() == "" or bad not in caught.value.detail


def test_a_service_that_cannot_read_its_keys_lets_nobody_in_and_says_so(guarded: Guarded) -> None:
    guarded.file.write_text("[keys")
    until(lambda: guarded.call("GET", "/readyz").status_code == 503)
    ready = guarded.call("GET", "/readyz").json()
    assert (ready["status"], ready["detail"]) == (
        "not ready",
        "the API keys cannot be read, so nobody is let in; the log says why",
    )
    refused = guarded.call("GET", "/v1/models", "admin")
    assert (refused.status_code, refused.json()["kind"], "retry-after" in refused.headers) == (503, "unavailable", True)
    assert guarded.call("GET", "/healthz").status_code == 200
    add_key(guarded.file.with_name("fresh.toml"), "again", Role.ADMIN, Quota())
    guarded.file.with_name("fresh.toml").replace(guarded.file)
    until(lambda: guarded.call("GET", "/readyz").status_code == 200)
