"""Answers that do not fit what was asked, and things that are no teacher's service."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.cache import Fields, Targets
from potstill.cache.errors import PotstillError, SpecMismatch, TeacherFailed, WireVersionError
from potstill.cache.wire import scores as wire
from potstill.clients.http_admin import HttpAdmin
from potstill.clients.http_teacher import HttpTeacher
from potstill.clients.retry import RetryPolicy
from tests.support.fakes import fake_identity
from tests.support.processes.scripted_service import Script, answered, reply
from tests.support.processes.servers import serving
from tests.support.scored_rows import rows_of

FAST = RetryPolicy(attempts=4, base=0.01, cap=0.05)
WANT = Fields(k=4)


async def _open_and_score(url: str) -> list[Targets]:
    async with HttpTeacher.open(url, "smol") as remote:
        return await remote.score(rows_of(3), WANT)


def another_teacher(script: Script, body: bytes) -> bytes:
    script.identity = replace(script.identity, revision="2")
    return answered(script, body)


def changed(change: Callable[[list[Targets]], list[Targets]]) -> Callable[[Script, bytes], bytes]:
    def step(script: Script, body: bytes) -> bytes:
        answer = wire.answer_from_arrow(answered(script, body))
        return wire.answer_to_arrow(wire.ScoreAnswer(answer.identity, change(answer.targets)), WANT)

    return step


def replaced(**arrays: Callable[[Targets], Any]) -> Callable[[Script, bytes], bytes]:
    return changed(lambda targets: [replace(t, **{name: new(t) for name, new in arrays.items()}) for t in targets])


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
        (replaced(logprobs=lambda t: t.logprobs * np.float32(np.nan)), TeacherFailed, "NaN"),
        (replaced(ids=lambda t: t.ids + np.uint32(60)), TeacherFailed, "its vocabulary has 64"),
        (replaced(ids=lambda t: t.ids * np.uint32(0)), TeacherFailed, "id 0 twice"),
        (replaced(log_tail=lambda t: t.log_tail * 0), TeacherFailed, "sum to 1"),
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


async def test_the_same_weights_of_another_folder_are_the_same_teacher() -> None:
    def renamed(script: Script, body: bytes) -> bytes:
        script.identity = replace(script.identity, model="renamed")
        return answered(script, body)

    with serving(Script(renamed)) as url:
        assert len(await _open_and_score(url)) == 1


async def test_a_description_that_cannot_be_read_is_named() -> None:
    async def described(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            description = {"identity": fake_identity().to_json(), "provenance": {"steps": 1}}
            await reply(send, 200, json.dumps(description).encode())

    told = "describes teacher 'smol' badly: .*the steps of a provenance are 1"
    with serving(described) as url, pytest.raises(TeacherFailed, match=told):
        await _open_and_score(url)


async def test_something_else_on_the_port_is_named() -> None:
    async def hello(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            await reply(send, 200, b"hello")

    async def nowhere(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            await reply(send, 404, b"nope")

    for app in (hello, nowhere):
        with serving(app) as url:
            async with HttpAdmin.open(url) as admin:
                for call in (admin.teachers(), admin.replicas("smol"), _open_and_score(url)):
                    with pytest.raises(TeacherFailed, match="Potstill service"):
                        await call
