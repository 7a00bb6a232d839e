"""The API under inputs that nobody would write: from its own OpenAPI document, and valid Arrow bodies, damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from potstill.cache import Cache, Fields
from potstill.cache.wire import scores as wire
from potstill.teacher_service.hosting.hosted_teacher import HostedTeacher
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings.service import TeacherSettings
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import filled_cache
from tests.support.processes.servers import hosted, opens, serving_teachers

if TYPE_CHECKING:
    import schemathesis

GROWTH = 400 << 20
RIGHT = {"name": "fake", "teacher": "fake", "corpus": "docs"}


class FakeSource(TeacherSource):
    """Whatever model an admin asks for, a fake one is opened."""

    def host(self, settings: TeacherSettings) -> HostedTeacher:
        return HostedTeacher(settings.name, opens(FakeTeacher()), settings=settings)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A service with a teacher, and a cache where it has most of a corpus."""
    filled_cache(tmp_path / "cache", Fields(k=4, draws=5, entropy=True))
    cache = Cache.open(tmp_path / "cache", mode="r+")
    with serving_teachers(hosted("fake", FakeTeacher()), cache=cache, source=FakeSource()) as where:
        yield where


@pytest.mark.parametrize("right_name", [True, False])
@pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_nothing_that_the_api_describes_makes_it_fail(url: str, right_name: bool, examples: int) -> None:
    import schemathesis
    from schemathesis.core.result import Ok

    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in api.get_all_operations() if isinstance(result, Ok)]
    assert {operation.path for operation in operations} >= {"/v1/teachers/{name}/score", "/v1/corpora"}
    # What removes the teacher comes last: no other operation would find it.
    for operation in sorted(operations, key=lambda operation: operation.method == "delete"):

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case[Any]) -> None:
            # Any other name ends at once with 404 and hides what is behind it.
            if right_name:
                case.path_parameters.update({key: RIGHT[key] for key in case.path_parameters if key in RIGHT})
            assert_refused_or_answered(case.call().status_code)

        check()


def assert_refused_or_answered(status: int) -> None:
    assert status < 500 or status == 503, status


def request_body(want: Fields) -> bytes:
    rows = [np.arange(length, dtype=np.uint32) for length in (1, 5, 30)]
    return wire.request_to_arrow(wire.ScoreRequest(rows, want))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid request with bytes exchanged, cut out, doubled or added."""
    want = draw(st.sampled_from([Fields(k=4), Fields(k=0, draws=5), Fields(k=2, entropy=True, temperatures=(2.0,))]))
    body = bytearray(request_body(want))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        kind = draw(st.sampled_from(["flip", "byte", "word", "cut", "drop", "double", "insert"]))
        if kind == "flip" and body:
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and body:
            body[at] = draw(st.integers(0, 255))
        elif kind == "word":
            body[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
        elif kind == "cut":
            del body[at:]
        elif kind == "drop":
            del body[at : at + draw(st.integers(1, 64))]
        elif kind == "double":
            body[at:at] = body[at : at + draw(st.integers(1, 256))]
        else:
            body[at:at] = draw(st.binary(max_size=64))
    return bytes(body)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("examples", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_arrow_bodies_are_refused_or_answered_within_bounded_memory(url: str, examples: int) -> None:
    before = resident_bytes()
    with httpx.Client(timeout=http.SECONDS, base_url=url, headers={"content-type": wire.ARROW_MEDIA_TYPE}) as client:

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(damaged())
        def check(body: bytes) -> None:
            assert_refused_or_answered(client.post("/v1/teachers/fake/score", content=body).status_code)

        check()
        # And it still works.
        assert client.post("/v1/teachers/fake/score", content=request_body(Fields(k=4))).status_code == 200
    # The service is in this process.
    assert resident_bytes() - before < GROWTH
