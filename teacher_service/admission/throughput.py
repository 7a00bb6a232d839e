"""How fast an engine works: tokens per second while it has work, the recent past weighing most."""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY_SECONDS = 30.0


class Throughput:
    """Tokens and busy seconds, both forgotten at the same exponential rate; their ratio is the speed.

    Each sum alone would be an average of a few completions that arrive in bursts; the ratio of both does not depend
    on when between two bursts it is asked for.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0
        self._counted_to = 0.0

    @property
    def tokens_per_second(self) -> float:
        """While it has work; 0 as long as nothing was scored."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def begin(self) -> None:
        """It gets work after having none: the idle time before does not count."""
        self._counted_to = self._clock()

    def finish(self, tokens: int) -> None:
        """So many tokens were scored; call `begin` before what comes after an idle time."""
        now = self._clock()
        busy = now - self._counted_to
        keep = math.exp(-busy / _MEMORY_SECONDS)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + busy
        self._counted_to = now
