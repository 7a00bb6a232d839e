from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from potstill.cache.types import JSON, Teacher
from potstill.teacher_service.access.audit import Audit, AuditLine, detail_of
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings.service import AccessSettings, TeacherSettings
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.waiting import eventually


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"model": "http://any:hush@host:8700/v1?x=1"}, {"model": "http://...@host:8700/v1?x=1"}),
        ({"args": ["https://hush@host/a@b", "s3://a:p@ss@b/c"]}, {"args": ["https://...@host/a@b", "s3://...@b/c"]}),
        ({"model": "http://host/?a=1&api_key=hush&b=2"}, {"model": "http://host/?a=1&api_key=...&b=2"}),
        (
            {"api_keys": ["hush"], "Password": 1234, "secret": {"a": "hush"}},
            {"api_keys": "...", "Password": "...", "secret": "..."},
        ),
        ({"headers": {"Authorization": "Bearer hush"}}, {"headers": {"Authorization": "..."}}),
        ({"note": "send bearer hush please"}, {"note": "send bearer ... please"}),
        ({"note": "mine is potstill_abc-DEF_1"}, {"note": "mine is potstill_..."}),
        ({"potstill_abc": 1}, {"potstill_...": 1}),
        ({"batch_tokens": 4096, "tokens": ["hush"]}, {"batch_tokens": 4096, "tokens": "..."}),
        ({"model": "http://host/?next=a?my_key=hush;sort=key"}, {"model": "http://host/?next=a?my_key=...;sort=key"}),
    ],
)
def test_the_audit_keeps_no_secret_wherever_it_stands(sent: JSON, kept: JSON) -> None:
    assert detail_of(json.dumps(sent).encode()) == kept


def test_the_audit_keeps_no_more_levels_than_any_line_can_be_made_of() -> None:
    kept = json.dumps(detail_of(b'{"options": %s}' % (b"[" * 470 + b"]" * 470)))
    assert kept.count("[") < 40
    assert '"..."' in kept


@contextmanager
def room_for(file: Path, num_bytes: int) -> Iterator[None]:
    """Let files grow to so many bytes more than this one has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 1, 100])
async def test_a_line_that_the_disk_has_no_room_for_is_in_the_log_and_no_part_of_it_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_bytes: int
) -> None:
    file = tmp_path / "audit.jsonl"
    audit = Audit(file)
    lines = [
        AuditLine(caller=name, action="PUT /x", target="/x" * 50, detail=None, status=200, request_id="r")
        for name in ("ann", "bob", "eve")
    ]
    await audit.record(lines[0])
    with room_for(file, num_bytes):
        await audit.record(lines[1])
    await audit.record(lines[2])
    assert [json.loads(line)["caller"] for line in file.read_text().splitlines()] == ["ann", "eve"]
    assert '"bob"' in caplog.text


@asynccontextmanager
async def never_up() -> AsyncIterator[Teacher]:
    await asyncio.Event().wait()
    yield FakeTeacher()


class Slow(TeacherSource):
    """Its teachers start for ever."""

    def host(self, settings: TeacherSettings) -> HostedTeacher:
        return HostedTeacher(settings.name, never_up, settings=settings)


async def test_an_action_that_is_cancelled_is_written_down(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    service = Service([], access=Access.of(AccessSettings(audit_file=str(file))), source=Slow())
    transport = httpx.ASGITransport(create_app(service))
    async with (
        service.running(),
        httpx.AsyncClient(timeout=http.SECONDS, transport=transport, base_url="http://localhost") as client,
    ):
        adding = asyncio.create_task(client.put("/v1/teachers/new", json={"model": "m"}))
        await eventually(lambda: "new" in service.teachers)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
    [line] = [json.loads(text) for text in file.read_text().splitlines()]
    assert (line["target"], line["status"], line["detail"]) == ("/v1/teachers/new", 499, {"model": "m"})
