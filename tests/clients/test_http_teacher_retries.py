"""What the client tries again, how long it waits, and when it gives up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from potstill.cache import Fields, Targets
from potstill.cache.errors import (
    DeadlineExceeded,
    MediaTypeError,
    Overloaded,
    PotstillError,
    TeacherFailed,
    Unavailable,
)
from potstill.cache.types import Teacher
from potstill.clients.http_teacher import HttpTeacher
from potstill.clients.retry import RetryPolicy
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import LimitSettings
from tests.support.fakes import BrokenTeacher, FakeTeacher
from tests.support.processes.scripted_service import Script, answered
from tests.support.processes.servers import hosted, serving, serving_teachers
from tests.support.scored_rows import assert_scored, rows_of

FAST = RetryPolicy(attempts=4, base=0.01, cap=0.05)
ONCE = RetryPolicy(attempts=1)
WANT = Fields(k=4)


async def test_a_teacher_failure_is_not_tried_again() -> None:
    broken = BrokenTeacher(TeacherFailed("the engine died"))
    with serving_teachers(hosted("smol", broken)) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            with pytest.raises(TeacherFailed, match="the engine died"):
                await remote.score(rows_of(3), WANT)


@pytest.mark.parametrize("failure", [429, 503, "cut", "html"])
async def test_what_may_be_tried_again_is(failure: Any) -> None:
    script = Script(failure, failure, answered)
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))
    assert len(script.requests) == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [(429, Overloaded), (503, Unavailable), ("cut", Unavailable), ("html", Unavailable)],
)
async def test_the_last_failure_is_raised_when_the_attempts_are_used_up(
    failure: Any, error: type[PotstillError]
) -> None:
    script = Script(failure)
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            with pytest.raises(error):
                await remote.score(rows_of(3), WANT)
    assert len(script.requests) == FAST.attempts


@pytest.mark.parametrize(("failure", "error"), [(500, PotstillError), (415, MediaTypeError)])
async def test_what_may_not_be_tried_again_is_not(failure: int, error: type[PotstillError]) -> None:
    script = Script(failure)
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            with pytest.raises(error, match=f"scripted {failure}"):
                await remote.score(rows_of(3), WANT)
    assert len(script.requests) == 1


async def test_a_connection_that_breaks_before_the_answer_is_tried_again() -> None:
    script = Script(answered)
    dropped = 0

    async def breaking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dropped
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            content = json.dumps({"name": "smol", "identity": script.identity.to_json()}).encode()
        else:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            content = answered(script, await reader.readexactly(length))
            dropped += 1
        if head.startswith(b"GET") or dropped == 3:
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content))
            writer.write(content)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(breaking, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))
    assert dropped == 3


async def test_retry_after_is_honoured() -> None:
    script = Script(429, answered, headers={"retry-after": "1"})
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            begin = time.monotonic()
            await remote.score(rows_of(3), WANT)
    assert 1.0 <= time.monotonic() - begin < 50.0


async def test_while_the_service_says_when_to_come_back_only_the_deadline_ends_the_tries() -> None:
    script = Script(*[503] * 6, answered, headers={"retry-after": "0"})
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))
        assert len(script.requests) == 7
        script.steps = [503]
        async with HttpTeacher.open(url, "smol", retry=ONCE) as remote:
            with pytest.raises(Unavailable):
                await remote.score(rows_of(3), WANT)
        assert len(script.requests) == 8


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for_but_told() -> None:
    script = Script(429, answered, headers={"retry-after": "60"})
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST, timeout=59.0) as remote:
            begin = time.monotonic()
            with pytest.raises(Overloaded, match="scripted 429") as told:
                await remote.score(rows_of(3), WANT)
    assert time.monotonic() - begin < 50.0
    assert told.value.retry_after == 60.0


async def test_a_wait_of_our_own_beyond_the_deadline_is_the_deadlines_end() -> None:
    script = Script(429, answered)
    with serving(script) as url:
        slow = RetryPolicy(base=1e9, cap=1e9)
        async with HttpTeacher.open(url, "smol", retry=slow, timeout=59.0) as remote:
            with pytest.raises(DeadlineExceeded, match="no time left to try again; .* overloaded: scripted 429"):
                await remote.score(rows_of(3), WANT)


async def test_the_deadline_ends_a_hanging_call_and_is_told_to_the_service() -> None:
    script = Script("hang")
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST, timeout=2.0) as remote:
            begin = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await remote.score(rows_of(3), WANT)
            assert 1.9 < time.monotonic() - begin < 50.0
    assert 0.0 < float(script.requests[0]["potstill-timeout"]) <= 2.0


async def test_the_deadline_is_of_the_whole_call_not_of_each_request() -> None:
    slow = FakeTeacher(tokens_per_second=20.0)
    with serving_teachers(hosted("smol", slow)) as url:
        async with HttpTeacher.open(url, "smol", timeout=2.0, max_in_flight=1, request_tokens=10) as remote:
            with pytest.raises(DeadlineExceeded):
                await remote.score(rows_of(*[10] * 8), WANT)


async def test_a_starting_teacher_is_waited_for() -> None:
    gate = threading.Event()

    @asynccontextmanager
    async def slowly() -> AsyncIterator[Teacher]:
        while not gate.is_set():  # noqa: ASYNC110  set by another thread
            await asyncio.sleep(0.01)
        yield FakeTeacher()

    async def open_and_score(url: str) -> list[Targets]:
        async with HttpTeacher.open(url, "smol") as remote:
            return await remote.score(rows_of(3), WANT)

    with serving(create_app(Service([HostedTeacher("smol", slowly)]))) as url:
        opening = asyncio.create_task(open_and_score(url))
        await asyncio.sleep(0.3)
        assert not opening.done()
        gate.set()
        assert_scored(rows_of(3), await opening)


async def test_an_overloaded_service_is_come_back_to() -> None:
    slow = FakeTeacher(tokens_per_second=200.0)
    limits = LimitSettings(max_tokens_in_flight=12)
    retry = RetryPolicy(attempts=50, base=0.05, cap=0.2)
    with serving_teachers(hosted("smol", slow), limits=limits) as url:
        async with HttpTeacher.open(url, "smol", request_tokens=10, retry=retry) as remote:
            rows = rows_of(*[10] * 4)
            assert_scored(rows, await remote.score(rows, WANT))


def test_waits_grow_are_jittered_and_capped() -> None:
    policy = RetryPolicy(attempts=100, base=0.5, cap=4.0)
    for failures, most in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 4.0), (5000, 4.0)):
        waits = [policy.wait_seconds(failures, None) for _ in range(300)]
        assert 0.0 <= min(waits) < most * 0.1
        assert most * 0.9 < max(waits) <= most
    assert 7.0 <= policy.wait_seconds(1, 7.0) <= 7.5
