"""A `potstill serve` in a process of its own, as a user would start it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from potstill.cache.errors import Unavailable

_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_READY = "ready: "


@contextmanager
def running_service(arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Run `potstill serve ARGUMENTS` until the block ends, and give its URL; its output goes to `log`.

    Raises:
        Unavailable: the service did not start; its last line says why.
    """
    command = [sys.executable, "-m", "potstill.clients.cli", "serve", *arguments]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield _wait_until_ready(process, log)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        ready = next((line for line in lines if line.startswith(_READY)), None)
        if ready is not None:
            return ready.split()[1]
        if process.poll() is not None:
            last = lines[-1] if lines else "it printed nothing"
            raise Unavailable(f"the service did not start: {last} (all of it in {log})")
        if time.monotonic() > deadline:
            raise Unavailable(f"the service was not ready after {_START_SECONDS:.0f} s; see {log}")
        time.sleep(0.2)  # a file cannot be waited for, and the engine takes half a minute to start


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # it answers what it has begun, and stops its engine
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
