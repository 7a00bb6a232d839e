"""`potstill serve` as a process."""

from __future__ import annotations

import os
import re
import signal

import pytest

from potstill.clients.cli import main
from tests.support.processes.forked import Forked


def environment() -> dict[str, str]:
    """Our variables without those that would be settings of a service."""
    return {key: value for key, value in os.environ.items() if not key.startswith("POTSTILL_")}


def serve(*arguments: str, **variables: str) -> Forked:
    """Start `potstill serve` with these variables added to its environment."""
    return Forked(main, ["serve", *arguments], environment={**environment(), **variables})


def refused(*arguments: str, **variables: str) -> str:
    """Run `potstill serve`, which must give up with one line on stderr; returns that line."""
    with serve(*arguments, **variables) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert out == ""
    assert err.count("\n") == 1, err
    return err


class Serving:
    """A `potstill serve` process that is up."""

    def __init__(self, *arguments: str) -> None:
        self.process = serve("--port", "0", *arguments)
        self.ready = self.process.stdout.readline()
        match = re.search(r"ready: (https?://\S+) teachers ", self.ready)
        if match is None:
            with self.process:
                pytest.fail(f"not ready: {self.ready!r} {self.process.log.read_text()}")
        self.url = match[1]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int | None, str]:
        """Send a signal; returns the exit status and what was written to stderr."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int | None, str]:
        """Wait for its end; returns the exit status and what was written to stderr."""
        with self.process:
            _, stderr = self.process.communicate(timeout=300)
        return self.process.returncode, stderr
