"""Targets as HTTP responses."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse

from cache import wire
from cache.types import Fields


def targets_response(answer: wire.ScoreAnswer, fields: Fields, writes: str) -> Response:
    """The answer in the media type `writes`; `fields` gives K when there is no row."""
    if writes == wire.JSON_MEDIA_TYPE:
        return JSONResponse(wire.answer_to_json(answer))
    return Response(wire.answer_to_arrow(answer, fields), media_type=wire.ARROW_MEDIA_TYPE)
