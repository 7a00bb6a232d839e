"""A bound on what all requests hold together, of which no single key can take everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from potstill.cache.errors import LimitExceeded, Overloaded


@dataclass(slots=True, eq=False)
class SharedBound:
    """Counts what is held. The last eighth is kept for keys that hold less than half of what is in use.

    Where the service has no keys (the empty key) there is nobody to keep it for. Used from one event loop only.
    """

    limit: int
    """The most that may be held at once."""
    what: str
    """The unit, in the words of the refusal, like "bytes of answers"."""
    reason: str
    """The name under which a refusal is counted in `refusals`."""
    refusals: Counter[str]
    retry_after: Callable[[], float | None] = lambda: None
    """Function that tells in how many seconds some of it is probably free; None when that is not known."""
    in_use: int = 0
    _of_key: Counter[str] = field(default_factory=Counter)

    def take(self, key: str, amount: int, *, own: int = 0) -> None:
        """Hold more, until `give_back`.

        Args:
            key: the caller's.
            amount: in the unit of the limit.
            own: the part that this same request holds already; a single request may have everything.

        Raises:
            Overloaded: there is not enough left. LimitExceeded: it is more than the limit, and can never be held.
        """
        if amount > self.limit:
            self.refusals[self.reason] += 1
            raise LimitExceeded(
                f"{amount} {self.what} are over the {self.limit} that all together may have; ask for less at one time"
            )
        # A key with nothing but this request is not greedy, however large that is: it could never be served else.
        greedy = key != "" and 2 * self._of_key[key] >= self.in_use and self._of_key[key] > own
        limit = self.limit - self.limit // 8 if greedy else self.limit
        if self.in_use + amount > limit:
            self.refusals[self.reason] += 1
            share = f" (a key that holds half of them can have {limit})" if greedy else ""
            raise Overloaded(
                f"{self.in_use} {self.what} are in flight of at most {self.limit}{share}; retry later",
                retry_after=self.retry_after(),
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
