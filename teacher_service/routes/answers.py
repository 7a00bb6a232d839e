"""Targets as HTTP responses."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import StreamingResponse

from potstill.cache.types import Fields
from potstill.cache.wire import scores as wire
from potstill.teacher_service.routes.corpora.as_json import json_pieces

_BUFFERED_BYTES = 64 * 2**10  # of arrays whose JSON is sent whole; a longer one is written while it is sent


def targets_response(answer: wire.ScoreAnswer, fields: Fields, writes: str) -> Response:
    """The answer in the media type `writes`; `fields` gives K when there is no row."""
    if writes != wire.JSON_MEDIA_TYPE:
        return Response(wire.answer_to_arrow(answer, fields), media_type=wire.ARROW_MEDIA_TYPE)
    pieces = json_pieces(answer.identity, lambda: answer.targets, says_format=False)
    num_positions = sum(targets.num_positions for targets in answer.targets)
    if num_positions * fields.bytes_per_position(answer.identity.vocab_size) <= _BUFFERED_BYTES:
        return Response(b"".join(pieces), media_type=wire.JSON_MEDIA_TYPE)
    return StreamingResponse(pieces, media_type=wire.JSON_MEDIA_TYPE)
