"""The calls that a pool has in flight on each of its replicas, and which calls shared one."""

from __future__ import annotations

from collections import Counter


class CallsInFlight:
    """Counts a pool's calls by the replicas' unique ids. Used from one event loop only."""

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()
        """Tokens sent and not answered."""
        self.scored: Counter[str] = Counter()
        """Tokens answered."""
        self.crashed: set[str] = set()
        """Replicas that ended by themselves, though Serve may not know it yet."""
        self._calls: dict[str, set[CallInFlight]] = {}

    def begin(self, replica: str, num_tokens: int) -> CallInFlight:
        """Count a call of `num_tokens` on a replica; end it with `CallInFlight.end`."""
        call = CallInFlight(self, num_tokens)
        call.move(replica)
        return call

    def calls(self, replica: str) -> set[CallInFlight]:
        """The calls that a replica has now."""
        return self._calls.setdefault(replica, set())

    def forget(self, known: set[str]) -> None:
        """Drop replicas that are not among the `known` and have no call left."""
        for gone in (set(self.waiting) | set(self.scored) | set(self._calls)) - known:
            if not self.calls(gone):
                del self.waiting[gone], self.scored[gone], self._calls[gone]
        self.crashed &= known


class CallInFlight:
    """One call, and the replica that has it now."""

    def __init__(self, calls: CallsInFlight, num_tokens: int) -> None:
        self.alone = True
        """True as long as no other call has shared the replica with it."""
        self._calls = calls
        self._num_tokens = num_tokens
        self._replica: str | None = None

    def move(self, replica: str) -> str:
        """Count the call on this replica, and no longer on the one before; returns the replica."""
        if replica != self._replica:
            self.end()
            self._replica = replica
            others = self._calls.calls(replica)
            self.alone = not others
            for other in others:
                other.alone = False
            others.add(self)
            self._calls.waiting[replica] += self._num_tokens
        return replica

    def end(self) -> None:
        """Count the call no longer. May be repeated."""
        if self._replica is not None:
            self._calls.calls(self._replica).remove(self)
            self._calls.waiting[self._replica] -= self._num_tokens
            self._replica = None
