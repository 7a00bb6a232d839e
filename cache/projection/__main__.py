"""`python -m potstill.cache.projection` compiles the projection's loops and keeps the code, as a first run does.

That takes ten seconds of one core, which a container image or a machine's set-up pays once and its processes do not.
"""

from __future__ import annotations

import numpy as np

from potstill.cache.projection.first_tokens import FirstTokens
from potstill.cache.projection.kernels import Made, Taught, Wanted, path_logprobs, project_rows, sum_staying

_POSITIONS, _K, _IDS = 3, 2, 4


def main() -> None:
    """Project a few positions, for which numba compiles all that others need."""
    entries = np.zeros((_POSITIONS, _K), np.float32)
    ids, places = np.zeros((_POSITIONS, _K), np.uint32), np.arange(_POSITIONS)
    first, tail, flags = np.zeros(_IDS, np.int64), entries[:, 0].copy(), places > 0
    path = path_logprobs(ids, entries, tail, places)
    taught = Taught(ids, entries, tail, places, np.arange(_POSITIONS + 1), path)
    mapped = FirstTokens(first, first, first, np.zeros((1, 256), np.bool_), first, np.zeros(1))
    sum_staying(taught, mapped, np.zeros((2, 1)))
    wanted = Wanted(places, places, places, flags, flags)
    made = Made(ids.copy(), entries.copy(), tail.copy(), tail.copy(), np.zeros(_POSITIONS))
    project_rows(taught, mapped, wanted, _IDS, made)


if __name__ == "__main__":
    main()
