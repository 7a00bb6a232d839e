"""The OpenAPI document: FastAPI's, with the bodies that routes read by themselves and the shape of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from potstill.cache.fields import Fields
from potstill.cache.wire import scores as wire
from potstill.teacher_service.routes.completions.routes import is_openai_path

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
_FIELDS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {"type": "boolean", "default": False}
        if isinstance(default, bool)
        else {"type": "integer", "minimum": 0, "default": default}
        if isinstance(default, int)
        else {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
        for name, default in Fields().to_json().items()
    },
}
_SCORE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rows"],
    "properties": {"rows": {"type": "array", "items": _TOKEN_IDS}, "fields": _FIELDS},
}
_COUNT_OR_NULL = {"type": ["integer", "null"], "minimum": 0}
_COMPLETION = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "model": {"type": ["string", "null"]},
        "prompt": {"oneOf": [_TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}]},
        "prompt_logprobs": _COUNT_OR_NULL,
        "logprobs": _COUNT_OR_NULL,
        "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": 1},
        "temperature": {"type": ["number", "null"], "minimum": 0},
        "echo": {"type": ["boolean", "null"]},
        "return_token_ids": {"type": ["boolean", "null"]},
    },
}
_ROWS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rows"],
    "properties": {
        "rows": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        "fields": {"type": ["array", "null"], "items": {"type": "string"}},
        "k": {"type": ["integer", "null"], "minimum": 0},
    },
}
# Routes that read their bodies by themselves, so as to bound and decode them, which hides the bodies from FastAPI.
_ARROW = {wire.ARROW_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/teachers/{name}/score": {wire.JSON_MEDIA_TYPE: {"schema": _SCORE}, **_ARROW},
    "/v1/corpora/{corpus}/rows": {wire.JSON_MEDIA_TYPE: {"schema": _ROWS}, **_ARROW},
    "/v1/corpora/{corpus}/targets/{teacher}/rows": {wire.JSON_MEDIA_TYPE: {"schema": _ROWS}, **_ARROW},
    "/v1/completions": {wire.JSON_MEDIA_TYPE: {"schema": _COMPLETION}},
    "/v1/teachers/{name}/v1/completions": {wire.JSON_MEDIA_TYPE: {"schema": _COMPLETION}},
}
_ERROR = {
    "type": "object",
    "required": ["kind", "detail"],
    "properties": {"kind": {"type": "string"}, "detail": {"type": "string"}},
}

_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}},
        }
    },
}


def describe(app: FastAPI, *, version: str) -> None:
    """Add to `app.openapi()` the bodies that routes read by themselves, like Arrow streams, and the shape of errors."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, version)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _document(app: FastAPI, version: str) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=version, routes=app.routes)
    for path, content in _BODIES.items():
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    for path, operations in found["paths"].items():
        schema = _OPENAI_ERROR if is_openai_path(path) else _ERROR
        error = {"description": "An error of one line.", "content": {wire.JSON_MEDIA_TYPE: {"schema": schema}}}
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own shape, which our handlers never answer
            operation["responses"]["default"] = error
    return found
