"""Rows whose shard lacks a teacher's targets.

Shape legend:  S shards, L rows that lack targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.student_trainer.data.sources import TargetSource


def lacking_rows(corpus: Corpus, sources: Sequence[TargetSource]) -> NDArray[np.int64]:
    """List the rows [L], rising, of shards of which some source has no targets."""
    masks = [source.committed for source in sources if source.committed is not None]
    if not masks:
        return np.zeros(0, dtype=np.int64)
    lacking = np.flatnonzero(~np.logical_and.reduce(masks))
    starts, stops = corpus.shard_rows[lacking], corpus.shard_rows[lacking + 1]
    ranges = [np.arange(start, stop, dtype=np.int64) for start, stop in zip(starts, stops, strict=True)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *ranges])
