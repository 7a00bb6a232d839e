"""Asking a service to fill a corpus."""

from __future__ import annotations

import argparse
import time
from typing import Any

from potstill.cache import Fields
from potstill.clients.commands import fill as command
from tests.support import http

FIELDS = Fields(k=4)
BODY: dict[str, Any] = {"fields": FIELDS.to_json(), "batch_tokens": 200}


def until_state(address: str, *states: str) -> dict[str, Any]:
    """The job, once it is in one of these states."""
    deadline = time.monotonic() + 300
    while (at := http.get(address).json())["state"] not in states:
        assert time.monotonic() < deadline, at
        time.sleep(0.05)
    return dict(at)


def run_fill(url: str, *options: str) -> int:
    """The exit status of `potstill fill` for this job."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--url", url, "--corpus", "docs", "--teacher", "fake", *options]))
