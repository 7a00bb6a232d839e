"""When a watched job's service is asked again."""

from __future__ import annotations

import json
import time
from typing import Any

from potstill.cache.wire import scores as wire
from potstill.clients.fill_watch import FillWatch
from potstill.clients.patience import Patience
from potstill.clients.retry import RetryPolicy
from potstill.clients.sync_connection import SyncConnection
from tests.support.processes.scripted_service import reply
from tests.support.processes.servers import serving


class Starting:
    """A service that says once when to come back, and then how the job is."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.asked.append(time.monotonic())
        if len(self.asked) == 1:
            refusal = {"kind": "unavailable", "detail": "starting"}
            await reply(send, 503, json.dumps(refusal).encode(), {"retry-after": "1"})
        else:
            await reply(send, 200, json.dumps({"format": wire.WIRE_VERSION, "state": "running"}).encode())


def test_the_time_that_the_service_names_is_waited_for() -> None:
    service = Starting()
    told: list[str] = []
    with serving(service) as url, SyncConnection(url, retry=RetryPolicy(attempts=1)) as connection:
        patience = Patience(60.0, told.append, retry=RetryPolicy(base=0.0))
        watch = FillWatch(connection, "docs", "fake", patience, again="x")
        assert watch.look()["state"] == "running"
    first, second = service.asked
    assert second - first >= 1.0
    assert told == ["no answer for now (starting); trying again for up to 60 s", "the service answers again"]
