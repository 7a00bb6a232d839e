"""What an admin's client makes of answers that do not come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from potstill.cache.errors import UnknownTeacher
from potstill.clients.http_admin import HttpAdmin
from tests.support.processes.scripted_service import reply
from tests.support.processes.servers import serving


class Removing:
    """A service that has removed the teacher when it is asked again; its first answer is `first`."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.asked += 1
        if self.asked > 1 or self.first == "unknown":
            await self._refuse(send, 404, "unknown_teacher")
        elif self.first == "busy":
            await self._refuse(send, 503, "unavailable")
        elif self.first == "html":
            await reply(send, 504, b"<html>gateway timeout</html>")
        else:
            await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": False})

    async def _refuse(self, send: Any, status: int, kind: str) -> None:
        await reply(send, status, json.dumps({"kind": kind, "detail": kind}).encode())


@pytest.mark.parametrize("lost", ["cut", "html"])
async def test_a_teacher_that_is_gone_after_a_lost_answer_was_removed(lost: str) -> None:
    service = Removing(lost)
    with serving(service) as url:
        async with HttpAdmin.open(url) as admin:
            assert await admin.remove("smol") == {"name": "smol", "state": "removed"}
    assert service.asked == 2


@pytest.mark.parametrize("first", ["unknown", "busy"])
async def test_a_teacher_that_no_try_can_have_removed_is_unknown(first: str) -> None:
    with serving(Removing(first)) as url:
        async with HttpAdmin.open(url) as admin:
            with pytest.raises(UnknownTeacher):
                await admin.remove("smol")
