"""Processes of ours that start at once: forked from one that has imported what takes long to import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = ["potstill.teacher_service.serve", "potstill.clients.http_teacher", "httpcore", "tests.support.corpora"]
_CONTEXT.set_forkserver_preload([*_IMPORTED, "anyio._backends._asyncio", "potstill.cache.fill.loop"])


class Forked:
    """A call in a process of its own, with what `subprocess.Popen` has: text on pipes, signals, an exit status.

    What it writes to stderr goes into the file `log`. As a context manager it is killed on leaving if it still runs.

    Args:
        call: a function of a module, whose integer is the exit status; None is 0.
        arguments: its arguments.
        environment: the process's variables (default: ours).
    """

    def __init__(
        self, call: Callable[..., int | None], *arguments: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.log = Path(self._folder.name) / "stderr"
        their_input, our_input = _CONTEXT.Pipe(duplex=False)
        our_output, their_output = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run,
            args=(their_input, their_output, self.log, dict(environment or os.environ), call, arguments),
        )
        self._process.start()
        their_input.close()
        their_output.close()
        self.stdin = os.fdopen(os.dup(our_input.fileno()), "w")
        self.stdout = os.fdopen(os.dup(our_output.fileno()))
        our_input.close()
        our_output.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what is left of its output, and what it wrote to stderr."""
        self.stdin.close()
        out = self.stdout.read()
        self._process.join(timeout)
        assert self.returncode is not None, "it still runs"
        return out, self.log.read_text()

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()
        self.stdin.close()
        self.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _run(
    their_input: Connection,
    their_output: Connection,
    log: Path,
    environment: dict[str, str],
    call: Callable[..., int | None],
    arguments: tuple[object, ...],
) -> None:
    with log.open("wb") as stderr:
        for number, file in enumerate((their_input.fileno(), their_output.fileno(), stderr.fileno())):
            os.dup2(file, number)
    their_input.close()
    their_output.close()
    # Anew, as those of before know their files as they were.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    raise SystemExit(call(*arguments))
