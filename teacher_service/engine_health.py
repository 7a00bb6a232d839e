"""Whether one engine is well: it has not ended, and where work waits for it, it moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from cache.types import Teacher


@runtime_checkable
class Watched(Protocol):
    """A teacher with an engine that can end or get stuck while the teacher stays."""

    @property
    def failure(self) -> str:
        """Why the engine ended, in one line; empty while it runs."""
        ...

    @property
    def progress(self) -> int:
        """A number that changes whenever the engine finishes a step."""
        ...


class EngineHealth:
    """Counts the tokens that wait for one engine, and tells when it has to be replaced.

    A teacher that is not `Watched`, like one behind HTTP, has no engine of ours: it is never in trouble.

    Args:
        teacher: whose engine it is.
        wedged_seconds: an engine that has work, and finishes neither a step nor an answer for so long, is stuck.
    """

    def __init__(self, teacher: Teacher, *, wedged_seconds: float) -> None:
        self.tokens_waiting = 0
        self.tokens_scored = 0
        self._watched = teacher if isinstance(teacher, Watched) else None
        self._wedged_seconds = wedged_seconds
        self._calls = 0
        self._answers = 0
        self._seen: tuple[int, int] = (0, 0)
        self._moved_at = time.monotonic()

    @contextmanager
    def call(self, num_tokens: int) -> Iterator[None]:
        """Hold `num_tokens` as waiting; they are scored when the block ends well."""
        if not self._calls:
            self._moved_at = time.monotonic()
        self._calls += 1
        self.tokens_waiting += num_tokens
        try:
            yield
            self.tokens_scored += num_tokens
        finally:
            self._calls -= 1
            self._answers += 1
            self.tokens_waiting -= num_tokens

    def trouble(self) -> str:
        """Why the engine has to be replaced, in one line; empty when it is well. To be asked every few seconds."""
        if self._watched is None:
            return ""
        if self._watched.failure:
            return self._watched.failure
        seen = (self._watched.progress, self._answers)
        now = time.monotonic()
        if seen != self._seen or not self._calls:
            self._seen, self._moved_at = seen, now
        stuck = now - self._moved_at
        if stuck < self._wedged_seconds:
            return ""
        return f"the engine is wedged: {self.tokens_waiting} tokens wait, and nothing moved for {stuck:.0f} seconds"
