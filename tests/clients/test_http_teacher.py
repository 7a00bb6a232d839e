from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from potstill.cache import Fields, Targets
from potstill.cache.errors import (
    InvalidInput,
    LimitExceeded,
    PotstillError,
    Unavailable,
    UnknownTeacher,
    UnsupportedField,
)
from potstill.cache.types import Teacher, TeacherLimits, Tokens
from potstill.clients.http_admin import HttpAdmin
from potstill.clients.http_teacher import HttpTeacher, SyncHttpTeacher, open_http_teacher
from potstill.clients.retry import RetryPolicy
from tests.support.fakes import FakeTeacher, GatedTeacher
from tests.support.processes.scripted_service import Script, answered
from tests.support.processes.servers import hosted, serving, serving_teachers
from tests.support.scored_rows import assert_scored, rows_of
from tests.support.waiting import until

FAST = RetryPolicy(attempts=4, base=0.01, cap=0.05)
ONCE = RetryPolicy(attempts=1)
WANT = Fields(k=4)


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher(top_k_only=True)


@pytest.fixture
def url(teacher: FakeTeacher) -> Iterator[str]:
    with serving_teachers(hosted("smol", teacher)) as address:
        yield address


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
    async with HttpAdmin.open(url) as admin:
        assert (await admin.teachers())[0]["name"] == "smol"
        assert (await admin.replicas("smol"))["replicas"] == 1
        assert (await admin.change_replicas("smol", {"replicas": 1}))["target"] == 1
        with pytest.raises(LimitExceeded, match="Ray"):
            await admin.change_replicas("smol", {"replicas": 3})


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
        thread.join(timeout=300)
        assert seen == [Unavailable]
        until(lambda: gated.cancelled == 1)


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
