"""The health of one engine: it has not ended, and it moves while work waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Teacher


@runtime_checkable
class Watched(Protocol):
    """A teacher with an engine that can end or get stuck while the teacher stays."""

    @property
    def failure(self) -> str:
        """Reason for which the engine ended, in one line; empty while it runs."""

    @property
    def progress(self) -> int:
        """A number that changes whenever the engine finishes a step."""


class EngineHealth:
    """Counts the tokens that wait for one engine, and tells when it has to be replaced.

    An engine moves by a step, an answer or a failure of its own; a caller that leaves or is refused tells nothing about
    it. Time without a move adds up while calls wait, over all of them: callers that give up before `wedged_seconds` do
    not hide a stuck engine, and a pause between two callers does not count against it.

    A teacher that is not `Watched`, like one behind HTTP, has no engine of ours and is never in trouble.

    Args:
        teacher: the teacher that runs on the engine.
        wedged_seconds: an engine that has work, and neither ends a step nor answers for so long, is stuck.
    """

    def __init__(self, teacher: Teacher, *, wedged_seconds: float) -> None:
        self.tokens_waiting = 0
        self.tokens_scored = 0
        self._watched = teacher if isinstance(teacher, Watched) else None
        self._wedged_seconds = wedged_seconds
        self._calls = 0
        self._failures = 0
        self._seen: tuple[int, int, int] = (0, 0, 0)
        self._looked_at = time.monotonic()
        self._stuck_seconds = 0.0

    @contextmanager
    def call(self, num_tokens: int) -> Iterator[None]:
        """Count `num_tokens` as waiting during the block, and as scored when it ends without an error."""
        self._look()
        self._calls += 1
        self.tokens_waiting += num_tokens
        try:
            yield
            self.tokens_scored += num_tokens
        except TeacherFailed:
            self._failures += 1
            raise
        finally:
            self._look()
            self._calls -= 1
            self.tokens_waiting -= num_tokens

    @property
    def ended(self) -> bool:
        """True where the engine ended by itself."""
        return self._watched is not None and bool(self._watched.failure)

    def trouble(self) -> str:
        """Tell why the engine has to be replaced, in one line; empty when it is well. Call it every few seconds."""
        if self._watched is None:
            return ""
        if self._watched.failure:
            return self._watched.failure
        self._look()
        stuck = self._stuck_seconds
        if stuck < self._wedged_seconds:
            return ""
        return f"the engine is wedged: {self.tokens_waiting} tokens wait, and nothing moved for {stuck:.0f} seconds"

    def _look(self) -> None:
        """Add the time since the last look if calls waited and nothing moved; call it before `_calls` changes."""
        seen = (self._watched.progress if self._watched else 0, self.tokens_scored, self._failures)
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._stuck_seconds = seen, 0.0
        elif self._calls:
            self._stuck_seconds += now - self._looked_at
        self._looked_at = now
