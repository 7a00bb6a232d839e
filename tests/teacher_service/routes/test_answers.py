"""Score answers as JSON: the same text whether it is sent whole or in pieces, and nobody waits for it to be made."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable

import numpy as np
import pytest
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse

from potstill.cache import Fields, Targets
from potstill.cache.types import Tokens
from potstill.cache.wire import scores as wire
from potstill.teacher_service.routes.score import targets_response
from tests.support.fakes import FakeTeacher, fake_identity

EVERYTHING = Fields(k=4, draws=50, temperatures=(0.5, 2.0), entropy=True, dense=True)


def rows_of(*lengths: int) -> list[Tokens]:
    return [np.arange(length, dtype=np.uint32) % 64 for length in lengths]


def answered(teacher: FakeTeacher, rows: list[Tokens], fields: Fields) -> wire.ScoreAnswer:
    return wire.ScoreAnswer(teacher.identity, [teacher.targets(row, fields) for row in rows])


async def body_of(answer: wire.ScoreAnswer, fields: Fields) -> tuple[bytes, int]:
    """What is sent, and in how many pieces."""
    reply = targets_response(answer, fields, wire.JSON_MEDIA_TYPE)
    assert reply.media_type == wire.JSON_MEDIA_TYPE
    if not isinstance(reply, StreamingResponse):
        return bytes(reply.body), 1
    assert isinstance(reply.body_iterator, AsyncIterable)
    pieces = [piece if isinstance(piece, bytes) else str(piece).encode() async for piece in reply.body_iterator]
    return b"".join(pieces), len(pieces)


@pytest.mark.parametrize("fields", [EVERYTHING, Fields(k=8), Fields(k=0, entropy=True)])
@pytest.mark.parametrize("lengths", [(), (1,), (7, 1, 3), (500, 2, 700)])
async def test_json_is_that_of_the_wire_to_the_byte(lengths: tuple[int, ...], fields: Fields) -> None:
    answer = answered(FakeTeacher(), rows_of(*lengths), fields)
    expected = JSONResponse(wire.answer_to_json(answer)).body
    assert (await body_of(answer, fields))[0] == expected


async def test_a_long_answer_is_made_in_pieces_and_a_short_one_is_whole() -> None:
    teacher = FakeTeacher(fake_identity(vocab_size=256))
    long = answered(teacher, rows_of(600), Fields(k=200))
    body, num_pieces = await body_of(long, Fields(k=200))
    assert num_pieces > 1
    assert json.loads(body) == json.loads(json.dumps(wire.answer_to_json(long)))
    assert (await body_of(answered(teacher, rows_of(60), Fields(k=8)), Fields(k=8)))[1] == 1


async def test_what_is_not_finite_is_null_in_a_long_answer_too() -> None:
    targets = Targets.concat([FakeTeacher().targets(row, Fields(k=8)) for row in rows_of(*[50] * 40)])
    targets.logprobs[:, 5:] = -np.inf
    targets.log_tail[::3] = -np.inf
    answer = wire.ScoreAnswer(FakeTeacher().identity, [targets])
    body, _ = await body_of(answer, Fields(k=8))
    assert body == JSONResponse(wire.answer_to_json(answer)).body
    row = json.loads(body)["rows"][0]
    assert row["logprobs"][0][5:] == [None] * 3
    assert row["label_logprob"][49] is None


@pytest.mark.parametrize("fields", [EVERYTHING, Fields(k=8)])
@pytest.mark.parametrize("lengths", [(), (1,), (7, 1, 3), (500, 2, 3000)])
async def test_arrow_is_that_of_the_wire_to_the_byte(lengths: tuple[int, ...], fields: Fields) -> None:
    answer = answered(FakeTeacher(), rows_of(*lengths), fields)
    reply = targets_response(answer, fields, wire.ARROW_MEDIA_TYPE)
    whole = wire.answer_to_arrow(answer, fields)
    if isinstance(reply, StreamingResponse):
        assert len(whole) > 64 * 2**10
        assert isinstance(reply.body_iterator, AsyncIterable)
        assert b"".join([bytes(piece) async for piece in reply.body_iterator if not isinstance(piece, str)]) == whole
    else:
        assert reply.body == whole


def test_a_long_arrow_answer_is_sent_from_the_memory_of_its_targets() -> None:
    (targets,) = answered(FakeTeacher(), rows_of(500), Fields(k=8)).targets
    parts = list(wire.answer_parts(wire.ScoreAnswer(FakeTeacher().identity, [targets]), Fields(k=8)))
    views = [np.frombuffer(part, np.uint8) for part in parts]
    for array in (targets.ids, targets.logprobs):
        assert any(np.shares_memory(view, array) for view in views)
    assert sum(len(view) for view in views if not np.shares_memory(view, targets.ids)) < 2 * targets.logprobs.nbytes
