"""A prefill in a process of its own, for tests that kill it: python -m tests.fill_job ROOT TOKENS_PER_SECOND."""

from __future__ import annotations

import asyncio
import sys

from cache import Cache
from cache.fill import FillPlan, FillProgress, fill
from tests.corpora import plan_targets, teacher_for


def show(at: FillProgress) -> None:
    print(at.shards_committed, at.positions_scored, flush=True)


def main() -> None:
    cache = Cache.open(sys.argv[1], mode="r+")
    teacher = teacher_for(cache.corpus("docs"), tokens_per_second=float(sys.argv[2]))
    plan = FillPlan(batch_tokens=200, in_flight=2)
    asyncio.run(fill(teacher, plan_targets(cache, teacher), plan, on_progress=show))


if __name__ == "__main__":
    main()
