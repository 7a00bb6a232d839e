"""What is ours in the process that vLLM starts for an engine: it ends with its parent, and tells why it did not start.

vLLM finds `prepare` by the entry point `vllm.general_plugins` and calls it in each of its processes, before it builds
anything there. A process of an engine that is not ours is left as it is.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from potstill.cache.errors import TeacherFailed

_CAUSE_FILE = "POTSTILL_ENGINE_CAUSE_FILE"
"""Environment variable with the path to which an engine's process writes why it did not start."""


def prepare() -> None:
    """Make this process, if an engine of ours is to run in it, end with its parent, and tell why it did not start."""
    parent = multiprocessing.parent_process()
    cause_file = os.environ.get(_CAUSE_FILE)
    if parent is None or cause_file is None:
        return
    threading.Thread(target=_end_with, args=(parent,), name="ends with the parent", daemon=True).start()
    logging.getLogger("vllm.v1.engine.core").addFilter(_ToldInFile(Path(cause_file)))


@contextmanager
def failing_with_the_cause() -> Iterator[None]:
    """Start engines in the block; one in a process of its own fails by the error that it failed by there.

    Not for two starts at a time, as the variable is the whole process'.

    Raises:
        TeacherFailed: an engine in a process of its own did not start.
    """
    with tempfile.TemporaryDirectory(prefix="potstill-engine-") as folder:
        path = Path(folder) / "cause"
        os.environ[_CAUSE_FILE] = str(path)
        try:
            yield
        except RuntimeError as error:  # vLLM's, which says to look above
            if not path.exists():
                raise
            raise TeacherFailed(path.read_text(encoding="utf-8")) from error
        finally:
            del os.environ[_CAUSE_FILE]


def _end_with(parent: BaseProcess) -> None:
    parent.join()
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
