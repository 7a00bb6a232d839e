"""Deleting beside jobs: what was deleted stays deleted, however a job goes on, and nobody commits into nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Provenance, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.errors import SpecMismatch
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.read_through.cached_teacher import CachedTeacher, KeepPolicy
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.upkeep.delete import Removal, jobs_at_work, plan_set, plan_shards, remove
from potstill.clients.cli import main
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher

WANT = Fields(k=16)


@dataclass(frozen=True, slots=True)
class Work:
    cache: Cache
    corpus: Corpus
    teacher: FakeTeacher

    @property
    def root(self) -> Root:
        return self.cache.root

    def planned(self) -> TargetSet:
        """As another process would open it."""
        cache = Cache.open(self.root.url, mode="r+")
        return cache.plan_targets("fake", "docs", self.teacher.identity, fields=WANT)

    def fill(self, targets: TargetSet, **plan: float) -> None:
        asyncio.run(fill(self.teacher, targets, FillPlan(batch_tokens=512, **plan)))  # type: ignore[arg-type]

    def write(self, targets: TargetSet, shard: int) -> bool:
        first, last = (int(row) for row in self.corpus.shard_rows[shard : shard + 2])
        scored = Targets.concat([self.teacher.targets(self.corpus.row(row), WANT) for row in range(first, last)])
        return targets.write_shard(shard, scored, self.teacher.provenance)

    def delete(self, removals: list[Removal]) -> None:
        for removal in removals:
            remove(self.root, removal)

    def first_shard(self) -> list[Removal]:
        return plan_shards(self.root, "fake", "docs", None, [0])


@pytest.fixture
def work(tmp_path: Path) -> Work:
    cache, corpus = make_corpus(tmp_path / "c")
    return Work(cache, corpus, teacher_for(corpus))


class Interrupted(TargetSet):
    """One whose job is overtaken by something right before it writes a shard, or folds."""

    def before(self, shard: int | None, act: Callable[[], object]) -> Interrupted:
        self._when, self._act = shard, act
        return self

    def write_shard(
        self,
        shard: int,
        targets: Targets,
        provenance: Provenance,
        *,
        still_mine: Callable[[], bool] = lambda: True,
    ) -> bool:
        if shard == self._when:
            self._act()
        return super().write_shard(shard, targets, provenance, still_mine=still_mine)


def interrupted(targets: TargetSet, shard: int, act: Callable[[], object]) -> Interrupted:
    return Interrupted(targets.teacher, targets.corpus, targets.sets).before(shard, act)


def test_a_job_folds_what_is_committed_and_not_what_it_remembers(work: Work) -> None:
    def replaced() -> None:
        work.delete(work.first_shard())
        assert work.write(work.planned(), 0)

    last = work.corpus.num_shards - 1
    work.fill(interrupted(plan_targets(work.cache, work.teacher, k=16), last, replaced))
    held = Cache.open(work.root.url).targets("fake", "docs")
    assert held.committed.all()
    exact = work.teacher.targets(work.corpus.row(0), WANT)
    assert np.array_equal(held.read_rows([0])[0].ids, exact.ids)


class DeletesWhenItHasRead(Root):
    """A store on which a shard is deleted by somebody between a fold's reading of the commits and its manifest."""

    removals: list[Removal]

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        if path.endswith("manifest.json"):
            for removal in self.removals:
                remove(self, removal)
        return super().create(path, data, durable=durable)


def test_a_shard_that_is_deleted_while_the_commits_are_folded_does_not_come_back(work: Work) -> None:
    targets = work.planned()
    for shard in range(work.corpus.num_shards):
        assert work.write(targets, shard)
    root = DeletesWhenItHasRead.open(work.root.url)
    root.removals = work.first_shard()
    folding = TargetSet.open(root, "fake", Cache.open(work.root.url).corpus("docs"), work.cache._reading)
    assert not folding.fold()
    assert work.planned().committed.tolist() == [False] + [True] * (work.corpus.num_shards - 1)


def test_a_deletion_that_was_planned_before_the_commits_were_folded_takes_the_manifest_too(work: Work) -> None:
    targets = work.planned()
    for shard in range(work.corpus.num_shards):
        assert work.write(targets, shard)
    for removals in (work.first_shard(), plan_set(work.root, "fake", "docs", "first")):
        assert work.planned().fold()
        work.delete(removals)
        assert not work.planned().committed[0]
        if work.root.sizes("targets/fake/docs"):
            assert work.write(work.planned(), 0)


def test_a_job_does_not_commit_into_a_set_that_was_deleted_under_it(work: Work) -> None:
    targets = plan_targets(work.cache, work.teacher, k=16)
    deleted = interrupted(targets, 2, lambda: work.delete(plan_set(work.root, "fake", "docs", "first")))
    with pytest.raises(SpecMismatch, match="targets/fake/docs was deleted while it was filled; run the same command"):
        work.fill(deleted)
    assert not work.root.objects("targets/fake/docs/commits")
    work.fill(work.planned())
    assert Cache.open(work.root.url).targets("fake", "docs").read_rows([0])


def test_a_claim_is_heard_of_as_long_as_it_says(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    busy: list[str] = []

    def looked() -> None:
        assert work.root.folder is not None
        for claim in (work.root.folder / "targets/fake/docs/claims").iterdir():
            os.utime(claim, (time.time() - 150,) * 2)
        busy.extend(jobs_at_work(work.root, plan_set(work.root, "fake", "docs", "first")))
        assert main(["delete", work.root.url, "--teacher", "fake", "--yes"]) == 1

    work.fill(interrupted(plan_targets(work.cache, work.teacher, k=16), 2, looked), claim_seconds=600.0)
    assert busy == ["targets/fake/docs"]
    assert "wait until its claims expire" in capsys.readouterr().err


async def test_a_service_finds_the_targets_of_a_shard_that_was_deleted_and_filled_again(work: Work) -> None:
    await fill(work.teacher, work.planned(), FillPlan())
    live = teacher_for(work.corpus)
    cold = Cache.open(work.root.url, mode="r+", chunk_cache_bytes=0)
    async with CachedTeacher.open(live, name="fake", cache=cold, policy=KeepPolicy(k=16)) as cached:
        await cached.score([work.corpus.row(0)], WANT)
        work.delete(work.first_shard())
        await fill(work.teacher, work.planned(), FillPlan())
        await cached.score([work.corpus.row(1)], WANT)
        assert (cached.counters.hits, live.scored, cached.store_error) == (2, [], "")
