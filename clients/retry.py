"""Rules for calling a service again after an error: how often, and after which wait."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from potstill.cache.errors import DeadlineExceeded, InvalidInput, PotstillError


class Refusal(Exception):
    """An error in place of an answer; the next try may bring the answer.

    `may_be_done` is true where the service may have done its work all the same and only the answer was lost.
    """

    def __init__(self, error: PotstillError, *, may_be_done: bool) -> None:
        super().__init__(error.detail)
        self.error = error
        self.may_be_done = may_be_done


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter: a random wait, so that clients turned away together spread out.

    Raises:
        InvalidInput: fewer than one attempt, or a negative wait.
    """

    attempts: int = 8
    """Calls in total; 1 never tries again. While the service itself names a time to come back (`Retry-After`: it is
    there, but starting or busy), only the deadline ends the tries."""
    base: float = 0.25
    """Seconds: the upper end of the first wait; each later one doubles it."""
    cap: float = 15.0
    """Seconds: no upper end is above this. A longer Retry-After of the service is honoured."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base < 0 or self.cap < 0:
            raise InvalidInput(f"{self} needs at least one attempt and no negative seconds")

    def wait_seconds(self, failures: int, retry_after: float | None) -> float:
        """Seconds to wait after `failures` failures: `retry_after`, if the service named it, plus jitter."""
        # The exponent is bounded: 2.0 ** 1024 raises OverflowError, and a patient caller may get there.
        jitter = random.uniform(0.0, min(self.cap, self.base * 2.0 ** min(failures - 1, 60)))  # noqa: S311
        return jitter if retry_after is None else retry_after + jitter


class Tries:
    """Counts the failures of one piece of work, and knows when no time is left for another try.

    Args:
        policy: how to try again.
        seconds: from now, or from the last `got_on`, until the work is given up.
    """

    def __init__(self, policy: RetryPolicy, seconds: float) -> None:
        self._policy = policy
        self._seconds = seconds
        self.may_be_done = False
        """True where an earlier try may have done the work, as only its answer was lost."""
        self.got_on()

    @property
    def seconds_left(self) -> float:
        """Seconds until the work is given up; negative after that."""
        return self._ends - time.monotonic()

    def got_on(self) -> None:
        """Count failures and seconds anew, as something new arrived."""
        self._failures = 0
        self._ends = time.monotonic() + self._seconds
        self.last = "no answer yet"
        """The last failure, for messages."""

    def wait_seconds(self, refusal: Refusal) -> float:
        """Count a failure; return the seconds to wait before the next try.

        Raises:
            DeadlineExceeded: no time is left for it.
            PotstillError: the refusal's error, when it may not be tried again, or when the service asks for more time
                (`retry_after`) than is left: the caller may have that time.
        """
        self._failures += 1
        error = refusal.error
        self.last = f"attempt {self._failures} met {error.kind}: {error.detail}"
        if not self._tries_again(error):
            raise error from refusal.__cause__
        wait = self._policy.wait_seconds(self._failures, error.retry_after)
        if wait >= self.seconds_left:
            raise DeadlineExceeded(f"no time left to try again; {self.last}") from error
        self.may_be_done |= refusal.may_be_done
        return wait

    def _tries_again(self, error: PotstillError) -> bool:
        if error.retry_after is not None and self._policy.attempts > 1:  # the service asks us to come back
            return error.retryable and error.retry_after < self.seconds_left
        return error.retryable and self._failures < self._policy.attempts
