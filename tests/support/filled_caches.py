"""Caches with targets of every field, all but the last shard committed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from potstill.cache import Cache, Fields
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Targets
from tests.support.corpora import make_corpus, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher


def commit(targets: TargetSet, teacher: FakeTeacher, shards: Iterable[int]) -> None:
    """Score and commit shards."""
    corpus = targets.corpus
    for shard in shards:
        start, stop = (int(row) for row in corpus.shard_rows[shard : shard + 2])
        scored = [teacher.targets(row, targets.fields) for row in corpus.rows(start, stop)]
        if targets.pilot_rows():
            targets.make_ranks(Targets.concat(scored))
        assert targets.write_shard(shard, Targets.concat(scored), teacher.provenance)


def filled_cache(root: Path, fields: Fields, *, encoding: str = "u8", missing: int = 1) -> Cache:
    """The corpus `docs`, of which the teacher `fake` has all but the last shards."""
    cache, corpus = make_corpus(root, texts=topics(4, characters=500), shard_positions=400)
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher, fields=fields, encoding=encoding)
    commit(targets, teacher, range(corpus.num_shards - missing))
    return cache
