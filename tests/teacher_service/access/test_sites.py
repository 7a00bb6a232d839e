"""Requests that web pages of other sites have a browser send to a service on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.settings.service import AccessSettings
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, refused, serving_teachers


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_teachers(hosted("smol", FakeTeacher())) as address:
        yield address


FOREIGN = [
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example:8700"},
    {"host": "localhost.evil.example"},
    {"host": "[::1].evil.example"},
    {"host": ""},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_another_sites_page_is_refused(url: str, headers: dict[str, str]) -> None:
    path = f"{url}/v1/teachers/smol"
    for method in ("GET", "PUT", "DELETE"):
        refused(http.request(method, path, headers=headers, content=b"{}"), 403, "forbidden")
    refused(http.post(f"{path}/score", headers=headers, json={"rows": [[1]]}), 403, "forbidden")
    assert http.get(f"{url}/healthz", headers=headers).status_code == 200
    assert "smol" in http.get(f"{url}/readyz").text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:1234"},
        {"Host": "127.0.0.2"},
        {"Host": "[::1]:8700"},
        {"Host": "LOCALHOST"},
        {"Host": "localhost:7", "origin": "http://localhost:7", "sec-fetch-site": "same-origin"},
        {"Host": "localhost:7", "origin": "http://localhost:7"},
        {"sec-fetch-site": "none"},
    ],
)
def test_the_own_page_and_other_programs_are_served(url: str, headers: dict[str, str]) -> None:
    assert http.get(f"{url}/v1/teachers/smol", headers=headers).status_code == 200


def test_names_are_added_and_with_keys_any_is_right(tmp_path: Path) -> None:
    named = Access.of(AccessSettings(hosts=("Box.lan",)))
    with serving_teachers(hosted("smol", FakeTeacher()), access=named) as url:
        assert http.get(f"{url}/v1/teachers", headers={"Host": "box.LAN:80"}).status_code == 200
        refused(http.get(f"{url}/v1/teachers", headers={"Host": "box"}), 403, "forbidden")
    file = tmp_path / "keys.toml"
    key = {"authorization": f"Bearer {add_key(file, 'ann', Role.ADMIN, Quota())}"}
    with serving_teachers(hosted("smol", FakeTeacher()), access=Access.of(AccessSettings(keys_file=str(file)))) as url:
        assert http.get(f"{url}/v1/teachers", headers={**key, "Host": "any.example"}).status_code == 200
        refused(http.get(f"{url}/v1/teachers", headers={**key, "origin": "http://evil.example"}), 403, "forbidden")
