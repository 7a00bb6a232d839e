from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache import Fields, Targets, wire
from cache.errors import (
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    MediaTypeError,
    Overloaded,
    PotstillError,
    SpecMismatch,
    TeacherFailed,
    Unavailable,
    UnknownTeacher,
    UnsupportedField,
    WireVersionError,
)
from cache.types import Teacher, TeacherLimits, Tokens
from clients import HttpTeacher, RetryPolicy, SyncHttpTeacher
from clients.http_teacher import get_replicas, list_teachers, open_http_teacher, put_replicas, split_rows
from teacher_service.hosted import HostedTeacher
from teacher_service.settings import LimitSettings
from tests.fakes import FakeTeacher, fake_identity
from tests.servers import hosted, serving, serving_teachers
from tests.test_teacher_service_app import BrokenTeacher, GatedTeacher, until

FAST = RetryPolicy(attempts=4, base=0.01, cap=0.05)
ONCE = RetryPolicy(attempts=1)
WANT = Fields(k=4)


def rows_of(*lengths: int) -> list[Tokens]:
    return [(np.arange(length, dtype=np.uint32) + index) % 64 for index, length in enumerate(lengths)]


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher(top_k_only=True)


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    with serving_teachers(hosted("smol", teacher)) as address:
        yield address


def assert_scored(rows: Sequence[Tokens], answers: Sequence[Targets], k: int = WANT.k) -> None:
    fake = FakeTeacher()
    assert len(rows) == len(answers)
    for row, targets in zip(rows, answers, strict=True):
        expected = fake.distribution(row, k)
        np.testing.assert_array_equal(targets.ids, expected.ids)
        np.testing.assert_array_equal(targets.logprobs, expected.logprobs)
        np.testing.assert_array_equal(targets.log_tail, expected.log_tail)
        np.testing.assert_array_equal(targets.label_logprob, expected.label_logprob)


async def test_it_is_the_teacher_behind_it(url: str, teacher: FakeTeacher) -> None:
    async with HttpTeacher.open(url, "smol") as remote:
        as_teacher: Teacher = remote
        assert as_teacher.identity == teacher.identity
        assert as_teacher.provenance == teacher.provenance
        assert as_teacher.limits == TeacherLimits(max_top_k=64, max_row_tokens=None)
        rows = rows_of(5, 1, 2, 9)
        assert_scored(rows, await as_teacher.score(rows, WANT))
        assert await as_teacher.score([], WANT) == []


async def test_rows_are_split_by_tokens_and_come_back_in_order(url: str) -> None:
    rows = rows_of(*(1 + i % 7 for i in range(60)))
    async with HttpTeacher.open(url, "smol", request_tokens=10, max_in_flight=3) as remote:
        assert_scored(rows, await remote.score(rows, WANT))


def test_a_split_is_by_tokens_and_never_within_a_row() -> None:
    parts = [[len(row) for row in part] for part in split_rows(rows_of(4, 6, 1, 30, 2, 8, 0), 10)]
    assert parts == [[4, 6], [1], [30], [2, 8, 0]]
    assert list(split_rows([], 10)) == []
    assert [len(part) for part in split_rows(rows_of(*[1, 0] * 1500), 10**6)] == [1024, 1024, 952]


async def test_a_trailing_slash_and_a_longer_path_are_fine(url: str) -> None:
    async with HttpTeacher.open(f"{url}/", "smol") as remote:
        assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "smol",
        "127.0.0.1:8700",
        "localhost:8700",
        "ftp://x",
        "http://",
        "http://h:x",
        "http://h?a=1",
        "\x00",
    ],
)
async def test_a_bad_url_is_invalid_input(bad: str) -> None:
    with pytest.raises(InvalidInput, match="URL"):
        async with HttpTeacher.open(bad, "smol"):
            pass


async def test_bad_numbers_are_invalid_input(url: str) -> None:
    for bad in ({"timeout": 0}, {"timeout": float("nan")}, {"max_in_flight": 0}, {"request_tokens": 0}):
        with pytest.raises(InvalidInput):
            async with HttpTeacher.open(url, "smol", **bad):
                pass
    for policy in ({"attempts": 0}, {"base": -1.0}, {"cap": -1.0}):
        with pytest.raises(InvalidInput):
            RetryPolicy(**policy)


async def test_an_unknown_name_lists_the_known_ones(url: str) -> None:
    for name in ("nobody", "a/b", "../x", "ü"):
        with pytest.raises((UnknownTeacher, PotstillError)):
            async with HttpTeacher.open(url, name, retry=ONCE):
                pass
    with pytest.raises(UnknownTeacher, match="smol"):
        async with HttpTeacher.open(url, "nobody", retry=ONCE):
            pass


async def test_nobody_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        async with HttpTeacher.open(f"http://127.0.0.1:{port}", "smol", retry=FAST):
            pass


@pytest.mark.parametrize(
    ("want", "error"),
    [
        (Fields(k=65), LimitExceeded),
        (Fields(k=4, draws=5), UnsupportedField),
        (Fields(k=4, entropy=True), UnsupportedField),
    ],
)
async def test_a_refusal_is_raised_as_the_class_the_service_named(
    url: str, want: Fields, error: type[PotstillError]
) -> None:
    async with HttpTeacher.open(url, "smol") as remote:
        with pytest.raises(error):
            await remote.score(rows_of(3), want)


async def test_a_teacher_failure_is_not_tried_again() -> None:
    broken = BrokenTeacher(TeacherFailed("the engine died"))
    with serving_teachers(hosted("smol", broken)) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            with pytest.raises(TeacherFailed, match="the engine died"):
                await remote.score(rows_of(3), WANT)


class Script:
    """An ASGI app that answers each score request with the next step, the last one for ever.

    A step is a status (with the service's error body), `cut` (half an answer, then the connection breaks),
    `hang`, `html`, or a function of the request's body that gives the answer's.
    """

    def __init__(self, *steps: Any, headers: dict[str, str] | None = None) -> None:
        self.steps = list(steps)
        self.headers = headers or {}
        self.requests: list[dict[str, str]] = []
        self.identity = fake_identity()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["method"] == "GET":
            description = {"name": "smol", "identity": self.identity.to_json()}
            await reply(send, 200, json.dumps(description).encode())
            return
        self.requests.append({key.decode(): value.decode() for key, value in scope["headers"]})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        await self.play(step, body, send)

    async def play(self, step: Any, body: bytes, send: Any) -> None:
        if step == "hang":
            await asyncio.sleep(60)
        elif step == "html":
            await reply(send, 502, b"<html>bad gateway</html>")
        elif step == "cut":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": False})
        elif isinstance(step, int):
            error = {429: Overloaded, 503: Unavailable, 500: PotstillError, 415: MediaTypeError}[step]
            content = json.dumps({"kind": error.kind, "detail": f"scripted {step}"}).encode()
            await reply(send, step, content, self.headers)
        else:
            await reply(send, 200, step(self, body))


async def reply(send: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    pairs = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def answered(script: Script, body: bytes) -> bytes:
    request = wire.request_from_arrow(body)
    fake = FakeTeacher(script.identity)
    targets = [fake.distribution(row, request.fields.k) for row in request.rows]
    return wire.answer_to_arrow(wire.ScoreAnswer(script.identity, targets), request.fields)


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
    assert 1.0 <= time.monotonic() - begin < 3.0


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


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    script = Script(429, answered, headers={"retry-after": "60"})
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST, timeout=2.0) as remote:
            begin = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="overloaded: scripted 429"):
                await remote.score(rows_of(3), WANT)
    assert time.monotonic() - begin < 1.0


async def test_the_deadline_ends_a_hanging_call_and_is_told_to_the_service() -> None:
    script = Script("hang")
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST, timeout=0.5) as remote:
            begin = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await remote.score(rows_of(3), WANT)
            assert 0.4 < time.monotonic() - begin < 2.0
    assert 0.0 < float(script.requests[0]["potstill-timeout"]) <= 0.5


async def test_the_deadline_is_of_the_whole_call_not_of_each_request() -> None:
    slow = FakeTeacher(tokens_per_second=50.0)
    with serving_teachers(hosted("smol", slow)) as url:
        async with HttpTeacher.open(url, "smol", timeout=0.6, max_in_flight=1, request_tokens=10) as remote:
            with pytest.raises(DeadlineExceeded):
                await remote.score(rows_of(*[10] * 8), WANT)


async def test_a_starting_teacher_is_waited_for() -> None:
    gate = threading.Event()

    @asynccontextmanager
    async def slowly() -> AsyncIterator[Teacher]:
        while not gate.is_set():  # noqa: ASYNC110  set by another thread
            await asyncio.sleep(0.01)
        yield FakeTeacher()

    from teacher_service.app import create_app
    from teacher_service.service import Service

    with serving(create_app(Service.of([HostedTeacher("smol", slowly)]))) as url:
        opening = asyncio.create_task(_open_and_score(url))
        await asyncio.sleep(0.3)
        assert not opening.done()
        gate.set()
        assert_scored(rows_of(3), await opening)


async def _open_and_score(url: str) -> list[Targets]:
    async with HttpTeacher.open(url, "smol") as remote:
        return await remote.score(rows_of(3), WANT)


async def test_requests_under_way_are_bounded_over_all_calls() -> None:
    class Counting(FakeTeacher):
        now = 0
        most = 0

        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.02)
            self.now -= 1
            return await super().score(rows, want)

    counting = Counting()
    with serving_teachers(hosted("smol", counting)) as url:
        async with HttpTeacher.open(url, "smol", max_in_flight=3, request_tokens=4) as remote:
            calls = [remote.score(rows_of(*[4] * 6), WANT) for _ in range(4)]
            for answers in await asyncio.gather(*calls):
                assert_scored(rows_of(*[4] * 6), answers)
    assert counting.most == 3


async def test_an_overloaded_service_is_come_back_to() -> None:
    slow = FakeTeacher(tokens_per_second=200.0)
    limits = LimitSettings(max_tokens_in_flight=12)
    retry = RetryPolicy(attempts=50, base=0.05, cap=0.2)
    with serving_teachers(hosted("smol", slow), limits=limits) as url:
        async with HttpTeacher.open(url, "smol", request_tokens=10, retry=retry) as remote:
            rows = rows_of(*[10] * 4)
            assert_scored(rows, await remote.score(rows, WANT))


async def test_one_failing_request_cancels_the_others() -> None:
    gated = GatedTeacher()
    with serving_teachers(hosted("smol", gated)) as url:
        async with HttpTeacher.open(url, "smol", request_tokens=3) as remote:
            bad = np.array([1, 2, 99], np.uint32)
            with pytest.raises(LimitExceeded, match="vocabulary"):
                await remote.score([*rows_of(3, 3), bad], WANT)
        until(lambda: gated.waiting == 0)


async def test_a_cancelled_call_cancels_the_work_on_the_service() -> None:
    gated = GatedTeacher()
    with serving_teachers(hosted("smol", gated)) as url:
        async with HttpTeacher.open(url, "smol") as remote:
            call = asyncio.create_task(remote.score(rows_of(3), WANT))
            while gated.waiting == 0:  # noqa: ASYNC110  counted by another thread
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            while gated.cancelled == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            gated.gate.set()
            assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))


def another_teacher(script: Script, body: bytes) -> bytes:
    script.identity = replace(script.identity, revision="2")
    return answered(script, body)


def changed(change: Callable[[list[Targets]], list[Targets]]) -> Callable[[Script, bytes], bytes]:
    def step(script: Script, body: bytes) -> bytes:
        answer = wire.answer_from_arrow(answered(script, body))
        return wire.answer_to_arrow(wire.ScoreAnswer(answer.identity, change(answer.targets)), WANT)

    return step


def other_version(script: Script, body: bytes) -> bytes:
    return answered(script, body).replace(
        b"1\x00\x00\x00\x0f\x00\x00\x00potstill.format", b"9\x00\x00\x00\x0f\x00\x00\x00potstill.format"
    )


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (another_teacher, SpecMismatch, "revision: '1' != '2'"),
        (changed(lambda targets: targets[:1]), TeacherFailed, "1 rows for 2"),
        (changed(lambda targets: [*targets, targets[0]]), TeacherFailed, "3 rows for 2"),
        (changed(lambda targets: [t[: t.num_positions - 1] for t in targets]), TeacherFailed, "2 positions"),
        (changed(lambda targets: [t.prefix(3) for t in targets]), TeacherFailed, "k=3"),
        (changed(lambda targets: targets[::-1]), TeacherFailed, "positions"),
        (lambda *_: b"hello", TeacherFailed, "Arrow"),
        (lambda *_: b"", TeacherFailed, "Arrow"),
        (other_version, WireVersionError, "'9'"),
    ],
)
async def test_an_answer_that_does_not_fit_the_question_is_refused(
    step: Any, error: type[PotstillError], words: str
) -> None:
    with serving(Script(step)) as url:
        async with HttpTeacher.open(url, "smol", retry=FAST) as remote:
            with pytest.raises(error, match=words):
                await remote.score(rows_of(3, 5), WANT)


async def test_something_else_on_the_port_is_named() -> None:
    async def hello(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            await reply(send, 200, b"hello")

    async def nowhere(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            await reply(send, 404, b"nope")

    for app in (hello, nowhere):
        with serving(app) as url:
            for call in (list_teachers(url), get_replicas(url, "smol"), _open_and_score(url)):
                with pytest.raises(TeacherFailed, match="Potstill service"):
                    await call


async def test_no_store_and_the_key_are_sent() -> None:
    script = Script(answered)
    with serving(script) as url:
        async with HttpTeacher.open(url, "smol", store=False, api_key="k1") as remote:
            await remote.score(rows_of(3), WANT)
        async with HttpTeacher.open(url, "smol") as remote:
            await remote.score(rows_of(3), WANT)
    straight, kept = script.requests
    assert straight["cache-control"] == "no-store"
    assert straight["authorization"] == "Bearer k1"
    assert "cache-control" not in kept
    assert "authorization" not in kept


async def test_a_teacher_is_opened_by_its_spec(url: str, teacher: FakeTeacher) -> None:
    for spec in (url, f"{url}#smol", f"{url}/#smol"):
        async with open_http_teacher(spec, options={"timeout": 30, "attempts": 2, "request_tokens": 64}) as remote:
            assert remote.identity == teacher.identity
            assert_scored(rows_of(3), await remote.score(rows_of(3), WANT))
    with pytest.raises(UnknownTeacher):
        async with open_http_teacher(f"{url}#nobody"):
            pass


async def test_a_spec_without_a_name_needs_one_teacher() -> None:
    with (
        serving_teachers(hosted("a", FakeTeacher()), hosted("b", FakeTeacher())) as url,
        pytest.raises(InvalidInput, match=rf"a, b: choose one, like {url}#a"),
    ):
        async with open_http_teacher(url):
            pass


@pytest.mark.parametrize("options", [{"timeot": 1}, {"timeout": "1"}, {"attempts": True}, {"api_key": 5}])
async def test_bad_options_are_invalid_input(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        async with open_http_teacher("http://127.0.0.1:1#x", options=options):
            pass


async def test_replicas_are_read_and_asked_for(url: str) -> None:
    assert (await list_teachers(url))[0]["name"] == "smol"
    assert (await get_replicas(url, "smol"))["replicas"] == 1
    assert (await put_replicas(url, "smol", 1))["target"] == 1
    with pytest.raises(LimitExceeded, match="Ray"):
        await put_replicas(url, "smol", 3)


def test_the_facade_for_threads(url: str, teacher: FakeTeacher) -> None:
    wrong: list[BaseException] = []

    def ask(remote: SyncHttpTeacher, seed: int) -> None:
        try:
            rows = rows_of(*(1 + (seed + i) % 5 for i in range(8)))
            assert_scored(rows, remote.score(rows, WANT))
        except BaseException as error:  # noqa: BLE001  handed to the test's own thread
            wrong.append(error)

    with SyncHttpTeacher(url, "smol", request_tokens=6, max_in_flight=2) as remote:
        assert remote.identity == teacher.identity
        assert remote.provenance == teacher.provenance
        threads = [threading.Thread(target=ask, args=(remote, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(LimitExceeded):
            remote.score(rows_of(3), Fields(k=65))
    assert wrong == []
    with pytest.raises(Unavailable, match="not open"):
        remote.score(rows_of(3), WANT)
    assert not [thread for thread in threading.enumerate() if thread.name == "teacher smol"]


def test_a_facade_that_cannot_open_leaves_no_thread() -> None:
    for _ in range(2):
        with pytest.raises(InvalidInput), SyncHttpTeacher("nonsense", "lonely"):
            pass
    assert not [thread for thread in threading.enumerate() if thread.name == "teacher lonely"]


def test_closing_the_facade_ends_what_other_threads_wait_for() -> None:
    gated = GatedTeacher()
    seen: list[type[BaseException]] = []

    def ask(remote: SyncHttpTeacher) -> None:
        try:
            remote.score(rows_of(3), WANT)
        except PotstillError as error:
            seen.append(type(error))

    with serving_teachers(hosted("smol", gated)) as url:
        with SyncHttpTeacher(url, "smol") as remote:
            thread = threading.Thread(target=ask, args=(remote,))
            thread.start()
            until(lambda: gated.waiting == 1)
        thread.join(timeout=10)
        assert seen == [Unavailable]
        until(lambda: gated.cancelled == 1)


def test_waits_grow_are_jittered_and_capped() -> None:
    policy = RetryPolicy(attempts=100, base=0.5, cap=4.0)
    for failures, most in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 4.0), (5000, 4.0)):
        waits = [policy.wait_seconds(failures, None) for _ in range(300)]
        assert 0.0 <= min(waits) < most * 0.1
        assert most * 0.9 < max(waits) <= most
    assert 7.0 <= policy.wait_seconds(1, 7.0) <= 7.5


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (np.array([1.5, 2.7]), "row 0 is float64"),
        (np.array([True, False]), "row 0 is bool"),
        (np.array([-1, 3]), "ids from -1 to 3"),
        (np.array([[1, 2]]), "2 dimensions"),
    ],
)
async def test_what_would_become_other_ids_on_its_way_is_refused(url: str, row: Any, told: str) -> None:
    async with HttpTeacher.open(url, "smol") as teacher:
        with pytest.raises(InvalidInput, match=told):
            await teacher.score([row], Fields(k=4))
