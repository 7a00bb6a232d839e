"""Calls that are made again while a service does not answer, for as long as somebody is patient."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from potstill.cache.errors import DeadlineExceeded, PotstillError, Unavailable
from potstill.clients.retry import RetryPolicy

T = TypeVar("T")
_LOOK_SECONDS = 0.5


def has_no_answer(error: PotstillError) -> bool:
    """Tell whether an error means that there is no answer for now, and may be one later."""
    return error.retryable or isinstance(error, DeadlineExceeded)


class Patience:
    """Makes a call until it is answered.

    Args:
        seconds: without an answer after which a call is given up; 0 makes one try.
        tell: gets a line when there is no answer for now, and another when there is one again.
        retry: waits between two tries.
        given_up: asked while waiting; true ends the wait with the last error.
    """

    def __init__(
        self,
        seconds: float,
        tell: Callable[[str], None],
        *,
        retry: RetryPolicy | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._seconds = seconds
        self._tell = tell
        self._retry = retry or RetryPolicy()
        self._given_up = given_up

    def answer(self, ask: Callable[[], T], way_on: str = "") -> T:
        """Return what `ask` returns; `way_on` ends the error that gives up.

        Raises:
            Unavailable: no answer for as long as the patience lasts. PotstillError: any other refusal, at once.
        """
        begin = time.monotonic()
        failures = 0
        while True:
            try:
                found = ask()
            except PotstillError as error:
                if not has_no_answer(error):
                    raise
                failures += 1
                self._wait(error, failures, begin, way_on)
            else:
                if failures:
                    self._tell("the service answers again")
                return found

    def _wait(self, error: PotstillError, failures: int, begin: float, way_on: str) -> None:
        left = begin + self._seconds - time.monotonic()
        if left <= 0:
            told = f"no answer for {self._seconds:g} s ({error.detail}){way_on and '. '}{way_on}"
            raise Unavailable(told) from error
        if failures == 1:
            self._tell(f"no answer for now ({error.detail}); trying again for up to {self._seconds:g} s")
        # At most what is left, so that one last try is made at the very end of the patience.
        until = time.monotonic() + min(left, self._retry.wait_seconds(failures, error.retry_after))
        while (pause := until - time.monotonic()) > 0:
            if self._given_up():
                raise error
            time.sleep(min(pause, _LOOK_SECONDS))
