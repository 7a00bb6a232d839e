"""The API keys of a running service, read again whenever their file changes."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from potstill.cache.errors import InvalidInput, Unavailable
from potstill.teacher_service.access.auth import Caller
from potstill.teacher_service.access.keys_file import hash_key, read_keys

_LOG = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0  # one look at the file a second, however many requests come
_LONGEST_KEY = 256  # characters; the time to hash one must not grow with what a stranger sends


class KeyRing:
    """Finds the caller of a key.

    While the file cannot be read, no key is good: a key that was taken away must not live on by a file whose owner or
    text went wrong. The log says why, `/readyz` and a metric say that it is so, and callers are told to come back.

    Args:
        path: the TOML file that `potstill keys` wrote.
        clock: seconds, never running backwards.

    Raises:
        InvalidInput: the file cannot be read or is not right.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._version = _version(path)
        self._checked = clock()
        self._records = tuple(read_keys(path).values())
        self._failed = False

    @property
    def failed(self) -> bool:
        """True while the file cannot be read, so that no key is good."""
        if self._clock() - self._checked >= _CHECK_SECONDS:
            self._checked = self._clock()
            if _version(self._path) != self._version:
                self.reload()
        return self._failed

    def find(self, key: str) -> Caller | None:
        """Look up the caller that has the key, or None.

        Every hash is compared, each in constant time, so that the time tells nothing about what is in the file.

        Raises:
            Unavailable: the file cannot be read now.
        """
        if self.failed:
            raise Unavailable("the service cannot read its API keys; its log says why")
        given = hash_key(key[:_LONGEST_KEY])
        found: Caller | None = None
        for record in self._records:
            if hmac.compare_digest(record.sha256, given):
                found = Caller(record.name, record.role, record.quota)
        return found

    def reload(self) -> None:
        """Read the file again now."""
        self._checked = self._clock()
        # Before the content: a change in between is then seen as one at the next look, not missed.
        self._version = _version(self._path)
        self._records, self._failed = (), True  # whatever reading raises
        try:
            self._records = tuple(read_keys(self._path).values())
        except InvalidInput as error:
            _LOG.error("no API key is good until this is mended: %s", error.detail)
        else:
            self._failed = False
            _LOG.info("%s: %d API keys", self._path, len(self._records))


def _version(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()  # it is gone; reading it says so
    return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode)
