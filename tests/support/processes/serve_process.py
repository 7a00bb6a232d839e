"""`potstill serve` as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "potstill.clients.cli", "serve"]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("POTSTILL_")}


def refused(*arguments: str, **variables: str) -> str:
    """Run `potstill serve`, which must give up with one line on stderr; returns that line."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), **variables},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


class Serving:
    """A real `potstill serve` process that is up."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        match = re.search(r"ready: (http://\S+) teachers ", self.ready)
        if match is None:
            self.process.kill()
            pytest.fail(f"not ready: {self.ready!r} {self.process.communicate()[1]}")
        self.url = match[1]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit status and what was written to stderr."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=300)
        return self.process.returncode, stderr
