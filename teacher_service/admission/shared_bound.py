"""A bound on what all requests hold together, of which no single key can take everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from potstill.cache.errors import LimitExceeded, Overloaded


class SharedBound:
    """Counts what is held. The last eighth is kept for keys that hold less than half of what is in use.

    Where the service has no keys (the empty key) there is nobody to keep it for. Used from one event loop only.

    Args:
        limit: the most that may be held at once.
        what: the unit, in the words of the refusal, like "bytes of answers".
        reason: the name under which a refusal is counted in `refusals`.
        refusals: the counts, by reason.
        retry_after: tells in how many seconds some of it is probably free; None when that is not known.
    """

    def __init__(
        self,
        limit: int,
        what: str,
        *,
        reason: str,
        refusals: Counter[str],
        retry_after: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.in_use = 0
        self._limit = limit
        self._what = what
        self._reason = reason
        self._refusals = refusals
        self._retry_after = retry_after
        self._of_key: Counter[str] = Counter()

    def take(self, key: str, amount: int, *, own: int = 0) -> None:
        """Hold more, until `give_back`.

        Args:
            key: the caller's.
            amount: in the unit of the limit.
            own: the part that this same request holds already; a single request may have everything.

        Raises:
            Overloaded: there is not enough left. LimitExceeded: it is more than the limit, and can never be held.
        """
        if amount > self._limit:
            self._refusals[self._reason] += 1
            raise LimitExceeded(
                f"{amount} {self._what} are over the {self._limit} that all together may have; ask for less at one time"
            )
        # A key with nothing but this request is not greedy, however large that is: it could never be served else.
        greedy = key != "" and 2 * self._of_key[key] >= self.in_use and self._of_key[key] > own
        limit = self._limit - self._limit // 8 if greedy else self._limit
        if self.in_use + amount > limit:
            self._refusals[self._reason] += 1
            share = f" (a key that holds half of them can have {limit})" if greedy else ""
            raise Overloaded(
                f"{self.in_use} {self._what} are in flight of at most {self._limit}{share}; retry later",
                retry_after=self._retry_after(),
            )
        self.in_use += amount
        self._of_key[key] += amount

    def give_back(self, key: str, amount: int) -> None:
        """Hold `amount` less."""
        self.in_use -= amount
        self._of_key[key] -= amount
        if not self._of_key[key]:
            del self._of_key[key]

    @contextmanager
    def hold(self, key: str, amount: int) -> Iterator[None]:
        """Take the amount, and give it back at the end of the block."""
        self.take(key, amount)
        try:
            yield
        finally:
            self.give_back(key, amount)
