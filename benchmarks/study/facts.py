"""Facts about what the first teacher says of the sample, for the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.study.corpora import SAMPLE
from benchmarks.study.plan import FEWER_DRAWS, TEACHER, Plan
from benchmarks.study.teachers import is_filled
from potstill.cache import Cache
from potstill.cache.types import JSON, Fields

_KS = (8, 12, 32, 64)


def facts(plan: Plan, folder: Path) -> dict[str, JSON] | None:
    """Count different ids among the draws, and average the mass outside top-k and the loss; None without targets."""
    if not (folder / "cache").is_dir():
        return None
    cache = Cache.open(folder / "cache")
    if SAMPLE not in cache.corpora() or not all(is_filled(cache, name) for name in (TEACHER, FEWER_DRAWS)):
        return None
    end = cache.corpus(SAMPLE).num_positions
    read = cache.targets(TEACHER, SAMPLE).read(0, end, fields=Fields(k=plan.k))
    mass = np.exp(read.logprobs.astype(np.float64)).cumsum(axis=1)
    return {
        "positions": end,
        "loss": round(float(-np.nanmean(read.label_logprob)), 4),
        "tail": {str(k): round(float(1.0 - mass[:, k - 1].mean()), 4) for k in _KS if k <= plan.k},
        "unique": {
            str(draws): round(_unique(cache, name, end), 2)
            for draws, name in ((plan.fewer_draws, FEWER_DRAWS), (plan.draws, TEACHER))
        },
    }


def _unique(cache: Cache, name: str, end: int) -> float:
    """Average the number of different ids among the draws of a position."""
    targets = cache.targets(name, SAMPLE)
    held = targets.fields
    drawn = targets.read(0, end, fields=Fields(k=0, draws=held.draws, seed=held.seed)).draws
    assert drawn is not None, "asked for"
    return len(drawn.ids) / end
