"""Log lines: JSON for machines or text for a console, each with the id of the request it belongs to.

Nothing here is set up on import; `configure` is called once, by the command that owns the process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from potstill.cache.types import JSON
from potstill.teacher_service.settings import LogSettings

_LOG = logging.getLogger(__name__)
REQUEST_ID_HEADER = "x-request-id"
_VLLM_LOGGING = "VLLM_LOGGING_CONFIG_PATH"
_SELDOM_SECONDS = 10.0
_FOR_STRANGERS = ("asyncio", "uvicorn.error", "potstill.teacher_service.transport.listener")
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being served; empty outside of one."""


@dataclass(slots=True)
class AccessRecord:
    """A request's size and caller, for its access line. Filled in while it is served."""

    rows: int = 0
    tokens: int = 0
    caller: str = ""


_access_record: ContextVar[AccessRecord | None] = ContextVar("access_record", default=None)


def begin_record() -> AccessRecord:
    """Begin the record of a request; tasks started from this context share it."""
    record = AccessRecord()
    _access_record.set(record)
    return record


def access_record() -> AccessRecord:
    """The record of the current request; without a request one that nobody reads."""
    return _access_record.get() or AccessRecord()


def choose_request_id(given: str | None) -> str:
    """Take the caller's id if it is 1 to 64 of `A-Z a-z 0-9 . _ -`, else make a fresh one."""
    return given if given is not None and _GOOD_ID.fullmatch(given) else secrets.token_hex(8)


class JsonLines(logging.Formatter):
    """Formats records as JSON objects, one a line: time (UTC), level, logger, message and the request's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its line end."""
        line: dict[str, JSON] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_request_of(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Formats records for a console: one line a record, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """The text, without its line end."""
        # A caller's path or name may hold line ends and escape sequences; a console obeys them.
        message = record.getMessage().translate(_ESCAPES)
        about = {**getattr(record, "fields", {}), **_request_of(record)}
        words = [f"{key}={value}" for key, value in about.items() if value not in ("", None)]
        text = " ".join([_utc(record), record.levelname, f"{record.name}: {message}", *words])
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class Seldom(logging.Filter):
    """Passes one record of a text in ten seconds, with the number of those left out since the one before.

    For loggers on which callers without a key can have as many lines written as they like.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to write the record out."""
        if record.exc_info and record.name == "uvicorn.error":
            return True  # a traceback of ours, to be mended; asyncio's are of connections that broke
        # The text before values are filled in; asyncio's further lines name objects, no two of them alike.
        text = str(record.msg).partition("\n")[0]
        now = self._clock()
        if now - self._told.get(text, -_SELDOM_SECONDS) < _SELDOM_SECONDS:
            self._left_out[text] += 1
            return False
        self._told[text] = now
        if left_out := self._left_out.pop(text, 0):
            record.msg, record.args = f"{record.getMessage()} (and {left_out} times before)", ()
        return True


def configure(settings: LogSettings, stream: TextIO) -> None:
    """Send the log of the whole process to `stream`, and nowhere else.

    With JSON, texts that Python itself writes become lines of the log, too: warnings, and exceptions that end the
    process or a thread or that nobody can catch. vLLM is set to write such lines, also in processes of its own.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if settings.format == "json" else TextLines())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    # httpx logs every request to a teacher behind a URL, for which our own request has an access line already.
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))
    for name in _FOR_STRANGERS:
        logger = logging.getLogger(name)
        logger.filters = [Seldom()]
    if settings.format == "json":
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_the_end
        threading.excepthook = _log_the_end_of_a_thread
        sys.unraisablehook = _log_unraisable
        _have_vllm_write_json()


def _have_vllm_write_json() -> None:
    # By environment: each engine sets up vLLM's loggers anew when it starts, and some start in processes of their own.
    # Variables of vLLM's that are set already are the user's choice.
    if not {_VLLM_LOGGING, "VLLM_CONFIGURE_LOGGING"} & os.environ.keys():
        os.environ[_VLLM_LOGGING] = str(Path(__file__).with_name("vllm_logging.json"))


def _log_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _LOG.critical("the process ends by a failure that nobody expected", exc_info=(kind, error, trace))


def _log_the_end_of_a_thread(ended: threading.ExceptHookArgs) -> None:
    if issubclass(ended.exc_type, SystemExit):
        return  # how a thread ends itself
    name = "" if ended.thread is None else ended.thread.name
    error = BaseException() if ended.exc_value is None else ended.exc_value
    trace = ended.exc_traceback
    _LOG.error("the thread %r ends by a failure that nobody expected", name, exc_info=(ended.exc_type, error, trace))


def _log_unraisable(met: sys.UnraisableHookArgs) -> None:
    error = BaseException() if met.exc_value is None else met.exc_value
    where = met.err_msg or "a failure where nobody can be told, in"
    _LOG.error("%s %r", where, met.object, exc_info=(met.exc_type, error, met.exc_traceback))


def _request_of(record: logging.LogRecord) -> dict[str, str]:
    # A record knows its request only while it is made, which is when handlers of this process format it.
    current = getattr(record, "request_id", request_id.get())
    return {"request_id": current} if current else {}


def _utc(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
