"""Quotas: tokens that a key may have scored per minute and per day. Answers from the cache cost nothing.

The counts live in this process: a restart begins anew, and each service process counts for itself. Time is the wall
clock's at the start plus what has passed since: a clock that is set while the service runs neither refills a bucket nor
begins another day.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from potstill.cache.errors import InvalidInput, LimitExceeded, Overloaded

_MINUTE = 60.0
_DAY = 86_400.0
# A call may wait past midnight: what it gives back then belongs to the old day and must not be added to the new one.
_taken_on: ContextVar[int | None] = ContextVar("taken_on", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Tokens that one key may have scored; None is no limit.

    Raises:
        InvalidInput: a limit below 1.
    """

    tokens_per_minute: int | None = None
    """A bucket that holds this many and refills evenly. A larger call needs a full bucket and leaves it in debt, which
    the next call waits for."""
    tokens_per_day: int | None = None
    """Tokens per calendar day, UTC, by the machine's clock when the service started."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_minute", "tokens_per_day"):
            tokens = getattr(self, name)
            if tokens is not None and (type(tokens) is not int or tokens < 1):
                raise InvalidInput(f"{name} is {tokens!r}; it must be a whole number from 1, or left out for no limit")


@dataclass(slots=True)
class _Spent:
    owed: float = 0.0
    """Tokens missing from a full bucket, at `at`."""
    at: float = 0.0
    day: int = 0
    of_day: int = 0


class QuotaMeter:
    """Counts what every key has spent. Used from one event loop only.

    Args:
        wall: seconds since the epoch, read once, because quotas of a day end at midnight.
        clock: seconds that never go back, since any moment.
    """

    def __init__(self, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic) -> None:
        self._began = wall() - clock()
        self._clock = clock
        self._spent: dict[str, _Spent] = {}

    def take(self, key: str, quota: Quota, tokens: int) -> None:
        """Charge tokens to a key.

        Raises:
            Overloaded: over the quota; `retry_after` is when there is enough again.
            LimitExceeded: more than a whole day's quota.
        """
        _taken_on.set(None)
        if quota.tokens_per_minute is None and quota.tokens_per_day is None:
            return
        now = self._began + self._clock()
        spent = self._spent.setdefault(key, _Spent(at=now, day=int(now // _DAY)))
        _pass_time(spent, now, quota)
        # Both limits are checked before either is charged: a refused call costs nothing.
        _check_minute(spent, quota, tokens, key)
        _check_day(spent, quota, tokens, key, now)
        spent.owed += tokens
        spent.of_day += tokens
        _taken_on.set(spent.day)

    def give_back(self, key: str, tokens: int) -> None:
        """Return tokens that the same task took last and that were not scored."""
        spent = self._spent.get(key)
        if spent is None:
            return
        spent.owed = max(0.0, spent.owed - tokens)
        if spent.day == _taken_on.get():
            spent.of_day = max(0, spent.of_day - tokens)


def _pass_time(spent: _Spent, now: float, quota: Quota) -> None:
    refilled = (now - spent.at) * (quota.tokens_per_minute or 0) / _MINUTE
    spent.owed = max(0.0, spent.owed - refilled)
    spent.at = now
    if spent.day != int(now // _DAY):
        spent.day, spent.of_day = int(now // _DAY), 0


def _check_minute(spent: _Spent, quota: Quota, tokens: int, key: str) -> None:
    size = quota.tokens_per_minute
    if size is None:
        spent.owed = 0.0  # debts under a limit that an admin has lifted are forgotten
        return
    missing = min(tokens, size) - (size - spent.owed)
    if missing > 0:
        raise Overloaded(
            f"{tokens} tokens are over what is left of tokens_per_minute={size} of the key {key!r}; retry later",
            retry_after=missing / size * _MINUTE,
        )


def _check_day(spent: _Spent, quota: Quota, tokens: int, key: str, now: float) -> None:
    size = quota.tokens_per_day
    if size is None:
        return
    if tokens > size:
        raise LimitExceeded(f"{tokens} tokens are over tokens_per_day={size} of the key {key!r}; send fewer rows")
    if spent.of_day + tokens > size:
        raise Overloaded(
            f"{tokens} tokens are over what is left of tokens_per_day={size} of the key {key!r}; "
            "it begins anew at midnight UTC",
            retry_after=_DAY - now % _DAY,
        )
