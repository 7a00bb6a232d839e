"""`potstill evaluate` as tests call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from potstill.clients.cli import main


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Call it with these arguments, and give the JSON that it prints."""

    def call(*arguments: object) -> dict[str, Any]:
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call
