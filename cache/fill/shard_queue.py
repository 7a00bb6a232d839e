"""The queue of uncommitted shards, from which several jobs take their work."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from potstill.cache.store import Claims
from potstill.cache.store.claims import Claim
from potstill.cache.targets import TargetSet

PILOT = "pilot"
"""Name of the claim on scoring the pilot rows, from which the rank table is made."""


def claim_name(shard: int) -> str:
    """Name under which a shard is claimed."""
    return f"{shard:06d}"


class ShardQueue:
    """The shards that had no commit at the start, taken one by one under claims. Not thread-safe."""

    def __init__(self, targets: TargetSet, claims: Claims) -> None:
        committed = targets.committed
        self.shards_before = int(committed.sum())
        self.elsewhere: set[int] = set()
        """Shards that other jobs committed since the start."""
        self._targets = targets
        self._claims = claims
        self.pending: NDArray[np.bool_] = ~committed
        """[S] True for a shard without a commit, as far as is known; shards in work here included."""
        self._in_work: set[int] = set()
        self._next: int | None = None

    @property
    def num_pending(self) -> int:
        """Number of shards without a commit, as far as is known."""
        return int(self.pending.sum())

    @property
    def num_waiting(self) -> int:
        """Number of shards without a commit that are not in work here."""
        return self.num_pending - len(self._in_work)

    def take(self) -> tuple[int, Claim] | None:
        """Claim a shard. None when no shard is left, or every one left is another job's right now.

        Raises:
            StoreError: the store does not answer.
        """
        busy = self._claims.busy()
        if self._next is None:
            # A job that joins others starts at a random shard, so that they seldom reach for the same one.
            self._next = random.randrange(len(self.pending)) if busy else 0  # noqa: S311
        fresh = False
        while True:
            shard = self._choose(busy)
            if shard is None:
                # List the commits once before giving up: others may have committed what is claimed no more.
                if fresh or not self.num_waiting:
                    return None
                fresh = self._refresh()
                continue
            claim = self._claims.take(claim_name(shard))
            if claim is None:
                # Another job was faster, and is likely to take the next shard too: go elsewhere.
                busy.add(claim_name(shard))
                self._next = random.randrange(len(self.pending))  # noqa: S311
                continue
            # Its last owner may have committed and released it since the commits were listed.
            if self._targets.is_committed(shard):
                claim.release()
                self._refresh()
                continue
            self._next = shard + 1
            self._in_work.add(shard)
            return shard, claim

    def put_back(self, shard: int, *, committed: bool) -> None:
        """End the work on a taken shard. Unless this job `committed` it, it is another job's or will be taken again."""
        if committed:
            self.pending[shard] = False
        elif not self.pending[shard]:
            self.elsewhere.add(shard)
        self._in_work.discard(shard)

    def _choose(self, busy: set[str]) -> int | None:
        pending = np.flatnonzero(self.pending)
        for shard in np.roll(pending, -int(np.searchsorted(pending, self._next or 0))).tolist():
            if claim_name(shard) not in busy and shard not in self._in_work:
                return int(shard)
        return None

    def _refresh(self) -> bool:
        committed = self._targets.committed
        new = np.flatnonzero(self.pending & committed).tolist()
        self.elsewhere.update(shard for shard in new if shard not in self._in_work)
        self.pending[new] = False
        return True
