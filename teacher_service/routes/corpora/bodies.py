"""Checks of the parameters and bodies that callers of the corpus routes send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import Request

from potstill.cache.errors import InvalidInput
from potstill.teacher_service.admission.limits import json_value

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_KEYS = ("rows", "fields", "k")


def get_and_head(app: FastAPI, path: str, dependencies: Sequence[Any]) -> Callable[[Endpoint], Endpoint]:
    """Add a route for both methods. The OpenAPI document has GET alone, as each operation needs a name of its own."""

    def add(endpoint: Endpoint) -> Endpoint:
        app.head(path, dependencies=dependencies, include_in_schema=False)(endpoint)
        return app.get(path, dependencies=dependencies)(endpoint)

    return add


async def known_parameters(request: Request) -> None:
    """Refuse a query parameter that the route does not have: a misspelt `fields` would ask for everything.

    Raises:
        InvalidInput: naming it and those that are known.
    """
    known = sorted(parameter.alias for parameter in request.scope["route"].dependant.query_params)
    strange = sorted(set(request.query_params) - set(known))
    if strange:
        raise InvalidInput(f"query parameter {strange[0][:40]!r} is unknown; known are {', '.join(known) or 'none'}")


def rows_from_json(body: bytes, max_rows: int) -> tuple[list[int], list[str] | None, int | None]:
    """Read `{"rows": [3, 17], "fields": ["top_k"], "k": 8}`; all but the rows may be left out.

    Raises:
        InvalidInput: another shape. LimitExceeded: more than `max_rows` rows.
    """
    most = ("max_rows", max_rows)
    value = json_value(body, max_lists=most, max_values=most)
    if not isinstance(value, dict) or not _is_list_of(value.get("rows"), int):
        raise InvalidInput('the body must be a JSON object like {"rows": [3, 17]}')
    unknown = sorted(set(value) - set(_KEYS))
    if unknown:
        raise InvalidInput(f"the body has the unknown key {unknown[0][:40]!r}; known are {', '.join(_KEYS)}")
    names, k = value.get("fields"), value.get("k")
    if names is not None and not _is_list_of(names, str):
        raise InvalidInput('fields must be a list of names like ["top_k", "entropy"]')
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
        raise InvalidInput(f"k is {str(k)[:40]}; it must be a whole number of at least 0")
    if any(abs(row) >= 2**63 for row in value["rows"]):
        raise InvalidInput("rows has a number over 2**63; rows are counted from 0")
    return value["rows"], names, k


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
