"""A writer that is made to be killed: a fill that notes in shared memory what it is doing right now."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from potstill.cache import Cache, Fields, Targets
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.store import claims
from potstill.cache.store.groups import GroupWriter
from potstill.cache.store.root import Root
from potstill.cache.targets import segment_set
from potstill.cache.targets.commits import Commits
from potstill.cache.targets.ranks import SetRanks
from tests.support.corpora import plan_targets, teacher_for
from tests.support.fakes import FakeTeacher

PHASES = ("open", "claim", "score", "ranks", "encode", "write", "commit", "fold")
CLAIM_SECONDS = 1.0
PLAN = FillPlan(batch_tokens=300, claim_seconds=CLAIM_SECONDS)
TOKENS_PER_SECOND = 40_000.0


class PhasedTeacher(FakeTeacher):
    """Notes when it scores."""

    def __init__(self, base: FakeTeacher, phases: Any) -> None:
        super().__init__(base.identity, tokens_per_second=TOKENS_PER_SECOND)
        self._phases = phases

    async def score(self, rows: Any, want: Fields) -> list[Targets]:
        self._phases[PHASES.index("score")] += 1
        try:
            return await super().score(rows, want)
        finally:
            self._phases[PHASES.index("score")] -= 1


def note(phases: Any, owner: Any, name: str, phase: str, *, only: str = "") -> None:
    """Have a function of the cache note in shared memory that it runs (on a path with `only` in it)."""
    inner = getattr(owner, name)
    index = PHASES.index(phase)

    def noting(*args: Any, **kwargs: Any) -> Any:
        if only and only not in str(args[1]):
            return inner(*args, **kwargs)
        phases[index] += 1
        try:
            return inner(*args, **kwargs)
        finally:
            phases[index] -= 1

    setattr(owner, name, noting)


def writer(url: str, environment: Mapping[str, str], phases: Any, lost: Any) -> None:
    """One process that fills until the set is complete."""
    phases[PHASES.index("open")] = 1
    os.environ.update(environment)
    for name in ("busy", "take", "renew", "release"):
        note(phases, claims.Claims, name, "claim")
    note(phases, SetRanks, "make", "ranks")
    note(phases, segment_set, "encode_segment", "encode")
    note(phases, segment_set, "write_arrays", "write")
    note(phases, GroupWriter, "finish", "write")
    note(phases, Root, "create", "commit", only="/commits/")
    note(phases, Commits, "fold", "fold")
    cache = Cache.open(url, mode="r+")
    teacher = PhasedTeacher(teacher_for(cache.corpus("docs")), phases)
    targets = plan_targets(cache, teacher)
    phases[PHASES.index("open")] = 0
    report = asyncio.run(fill(teacher, targets, PLAN))
    lost.value += report.shards_lost
