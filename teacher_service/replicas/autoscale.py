"""The number of replicas that the waiting tokens call for. Pure: the time is an argument."""

from __future__ import annotations

import math
from collections import deque

from potstill.teacher_service.settings import AutoscaleSettings


class Autoscaler:
    """Follows the tokens that wait.

    The need at a moment is ceil(tokens waiting / tokens_per_replica), kept between the limits. Replicas are added up to
    the smallest need of the last `up_seconds`, and removed down to the largest of the last `down_seconds`, so that
    neither a short burst nor a short pause changes anything.
    """

    def __init__(self, settings: AutoscaleSettings) -> None:
        self.settings = settings
        self._needs: deque[tuple[float, int]] = deque()

    def wanted(self, *, now: float, tokens_waiting: int, replicas: int) -> int:
        """The number of replicas to want from now on.

        Args:
            now: monotonic time in seconds.
            tokens_waiting: at this moment.
            replicas: the number wanted so far.
        """
        limits = self.settings
        need = min(max(math.ceil(tokens_waiting / limits.tokens_per_replica), limits.min), limits.max)
        began = self._needs[0][0] if self._needs else now
        self._needs.append((now, need))
        # One observation at or before each window's beginning stays, so that the window is covered.
        horizon = now - max(limits.up_seconds, limits.down_seconds)
        while len(self._needs) > 1 and self._needs[1][0] <= horizon:
            self._needs.popleft()
        if replicas < limits.min or replicas > limits.max:
            # The limits were changed by an admin, who does not mean to wait for a window.
            return min(max(replicas, limits.min), limits.max)
        if now - began >= limits.up_seconds and (lasting := min(self._since(now - limits.up_seconds))) > replicas:
            return lasting
        if now - began >= limits.down_seconds and (peak := max(self._since(now - limits.down_seconds))) < replicas:
            return peak
        return replicas

    def _since(self, begin: float) -> list[int]:
        """The needs that held at some time since `begin`: one holds until the next observation."""
        held = [need for _, need in self._needs]
        until = [*[time for time, _ in self._needs][1:], math.inf]
        return [need for need, end in zip(held, until, strict=True) if end > begin]
