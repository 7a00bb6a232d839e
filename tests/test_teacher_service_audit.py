from __future__ import annotations

import json

import pytest

from cache.types import JSON
from teacher_service.audit import detail_of


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"model": "http://any:hush@host:8700/v1?x=1"}, {"model": "http://...@host:8700/v1?x=1"}),
        ({"args": ["https://hush@host/a@b", "s3://a:p@ss@b/c"]}, {"args": ["https://...@host/a@b", "s3://...@b/c"]}),
        ({"model": "http://host/?a=1&api_key=hush&b=2"}, {"model": "http://host/?a=1&api_key=...&b=2"}),
        (
            {"api_keys": ["hush"], "Password": 1234, "secret": {"a": "hush"}},
            {"api_keys": "...", "Password": "...", "secret": "..."},
        ),
        ({"headers": {"Authorization": "Bearer hush"}}, {"headers": {"Authorization": "..."}}),
        ({"note": "send bearer hush please"}, {"note": "send bearer ... please"}),
        ({"note": "mine is potstill_abc-DEF_1"}, {"note": "mine is potstill_..."}),
        ({"potstill_abc": 1}, {"potstill_...": 1}),
        ({"batch_tokens": 4096, "tokens": ["hush"]}, {"batch_tokens": 4096, "tokens": "..."}),
    ],
)
def test_the_audit_keeps_no_secret_wherever_it_stands(sent: JSON, kept: JSON) -> None:
    assert detail_of(json.dumps(sent).encode()) == kept
