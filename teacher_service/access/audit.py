"""The audit log: a JSON line for every admin action, done or refused, on the disk before the action is answered.

    {"time", "caller", "action", "target", "detail", "status", "request_id"}

`caller` is the key's name, "" where there are no keys or nobody was known; `action` the method and route; `target`
the path; `detail` the JSON that was sent, without what looks like a secret; `status` the answer's, 499 for none.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from potstill.cache.errors import InvalidInput
from potstill.cache.types import JSON

_LOG = logging.getLogger("potstill.audit")
_SECRET_WORDS = ("key", "token", "secret", "password", "authorization")
_SECRETS = (
    (re.compile(r"://[^/?#\s]*@"), "://...@"),
    (
        re.compile(rf"([?&;](?=[^?=&;\s]*?(?:{'|'.join(_SECRET_WORDS)}))[^?=&;\s]*+=)[^&;#\s]*+", re.IGNORECASE),
        r"\1...",
    ),
    (re.compile(r"\b(bearer|basic)\s+\S+", re.IGNORECASE), r"\1 ..."),
    (re.compile(r"potstill_\S+"), "potstill_..."),
)
"""Patterns and their replacements: a URL's userinfo and secret parameters, credentials of a header, our API keys.
No two places where one may begin look at the same characters, so that each takes time linear in a caller's text."""
_DEEPEST = 32  # levels of a body; no settings have so many
_LONGEST_TEXT = 500  # characters: a name or a message fits, and no caller can fill the disk with one request
DETAIL_BYTES = 16 * 2**10
"""Longest request body that is kept; of a longer one the line tells only the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """One action, done or refused."""

    caller: str
    action: str
    target: str
    detail: JSON
    status: int
    request_id: str
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Audit:
    """Writes the lines to a file, or without one to the log `potstill.audit`.

    The file is opened for every line, so that it may be moved away at any time.

    Raises:
        InvalidInput: the file cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        if path is None:
            # A quieter level of the log's other parts must not silence the audit.
            _LOG.setLevel(logging.INFO)
            return
        try:
            _append(path, b"")
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be written: {error.strerror}; choose another audit_file") from error

    async def record(self, line: AuditLine) -> None:
        """Keep one line; returns once it is on the disk."""
        if self._path is None:
            _LOG.info("%s", json.dumps(asdict(line)))
            return
        # In a thread: a disk takes milliseconds for an fsync, in which no other request would be served.
        try:
            await asyncio.to_thread(_append, self._path, json.dumps(asdict(line)).encode() + b"\n")
        except OSError as error:
            # The action is done and cannot be refused any more, so a full disk must not lose its line: the log gets it.
            _LOG.error("%s: cannot be written (%s): %s", self._path, error.strerror, json.dumps(asdict(line)))


def detail_of(body: bytes) -> JSON:
    """A request body as it may be kept: JSON without secrets, else its length in bytes."""
    if not body:
        return None
    try:
        return _without_secrets(json.loads(body)) if len(body) <= DETAIL_BYTES else f"{len(body)} bytes"
    except (ValueError, RecursionError):
        return f"{len(body)} bytes that are not JSON"


def _without_secrets(value: JSON, levels: int = _DEEPEST) -> JSON:
    if not levels:
        return "..."
    if isinstance(value, dict):
        hidden = {key: "..." if _is_secret(key, item) else item for key, item in value.items()}
        return {_text(key): _without_secrets(item, levels - 1) for key, item in hidden.items()}
    if isinstance(value, list):
        return [_without_secrets(item, levels - 1) for item in value]
    return _text(value) if isinstance(value, str) else value


def _is_secret(key: str, item: JSON) -> bool:
    name = key.lower()
    if isinstance(item, int | float | None):
        name = name.replace("tokens", "")  # a number of tokens, like batch_tokens
    return any(word in name for word in _SECRET_WORDS)


def _text(text: str) -> str:
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return text[:_LONGEST_TEXT]


def _append(path: Path, line: bytes) -> None:
    """Append a whole line; where the disk has no room for it, nothing, and raise OSError."""
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        # One process at a time: what is cut off after a failure must be no other's line. Closing ends the lock.
        fcntl.flock(number, fcntl.LOCK_EX)
        end = os.fstat(number).st_size
        try:
            if os.write(number, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(number)
        except OSError:
            os.ftruncate(number, end)
            raise
    finally:
        os.close(number)
