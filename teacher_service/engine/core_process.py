"""Our part in the process that vLLM starts for an engine: it ends with its parent, and tells why it did not start.

It has to be at work before vLLM is: until its handshake with the parent a process of vLLM's knows nothing of the
parent's end. So a text in the engine's configuration, `Lifeline`, brings it along: it is called where the process
unpickles its arguments.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.cache.errors import TeacherFailed

_STARTED_BY = "POTSTILL_ENGINE_STARTED_BY"
"""Environment variable of an engine's process: the parent's number, and the path to write to why it did not start."""
_LOOK_SECONDS = 0.5


class Lifeline(str):
    """A text for an engine's configuration that calls `prepare` in the process that it is unpickled in."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], Lifeline], tuple[()]]:
        """Pickle as the call."""
        return _prepared, ()


def _prepared() -> Lifeline:
    prepare()
    return Lifeline("ends with its parent")


def prepare() -> None:
    """Make this process, if an engine of ours is to run in it, end with its parent, and tell why it did not start."""
    number, _, path = os.environ.get(_STARTED_BY, "").partition(" ")
    if not number or int(number) == os.getpid():
        return
    del os.environ[_STARTED_BY]  # not for processes that this one starts
    threading.Thread(target=_end_with, args=(int(number), Path(path).parent), daemon=True).start()
    logging.getLogger("vllm.v1.engine.core").addFilter(_ToldInFile(Path(path)))


@contextmanager
def failing_with_the_cause() -> Iterator[None]:
    """Start engines in the block; one in a process of its own fails by the error that it failed by there.

    Not for two starts at a time, as the variable is the whole process'.

    Raises:
        TeacherFailed: an engine in a process of its own did not start.
    """
    with tempfile.TemporaryDirectory(prefix="potstill-engine-") as folder:
        path = Path(folder) / "cause"
        os.environ[_STARTED_BY] = f"{os.getpid()} {path}"
        try:
            yield
        except RuntimeError as error:  # vLLM's, which says to look above
            if not path.exists():
                raise
            raise TeacherFailed(path.read_text(encoding="utf-8")) from error
        finally:
            del os.environ[_STARTED_BY]


def _end_with(parent: int, folder: Path) -> None:
    # Looked at again and again: multiprocessing knows the parent only after the process has unpickled its arguments.
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)  # left by a parent that was killed while the engine started
    # At once: an engine that nobody reads from may be anywhere, and its memory is wanted for the next one.
    os._exit(1)


class _ToldInFile(logging.Filter):
    """Writes the cause of a failed start to a file and ends the process, instead of two tracebacks on stderr."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.exc_info and record.exc_info[1] and "failed to start" in record.getMessage()):
            return True
        error = record.exc_info[1]
        text = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        self._path.write_text(text, encoding="utf-8")
        # vLLM would raise the error again, for multiprocessing to print; nothing was started that wants to be closed.
        os._exit(1)
