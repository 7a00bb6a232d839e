from __future__ import annotations

import asyncio
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cache import Cache, Fields, Targets
from cache.errors import InvalidInput, TeacherFailed
from cache.fill import FillPlan, FillProgress, fill
from cache.garbage import find_garbage
from cache.targets import TargetSet
from cache.types import Tokens
from tests.corpora import make_corpus, plan_targets, teacher_for, topics
from tests.fakes import FakeTeacher

PLAN = FillPlan(batch_tokens=200, in_flight=2)


def segment_bytes(cache: Cache) -> dict[tuple[int, str], bytes]:
    """Every committed object's bytes, by shard and path within its segment."""
    targets = cache.targets("fake", "docs")
    folder = Path(cache.root.url)
    return {
        (commit.shard, item.path): (folder / targets.segment_path(commit.segment) / item.path).read_bytes()
        for commit in targets.commits()
        for item in commit.objects
    }


async def test_a_fill_commits_every_shard_and_a_second_one_finds_nothing_to_do(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    seen: list[FillProgress] = []
    report = await fill(teacher, plan_targets(cache, teacher), PLAN, on_progress=seen.append)
    assert report.shards_committed == corpus.num_shards
    assert report.positions_scored == corpus.num_positions
    assert seen[-1] == FillProgress(corpus.num_positions, corpus.num_positions, corpus.num_shards, corpus.num_shards)
    targets = cache.targets("fake", "docs")
    assert targets.committed.all()
    row = len(corpus) - 1
    assert np.array_equal(targets.read_rows([row])[0].ids, teacher.distribution(corpus.row(row), 16).ids)
    teacher.scored.clear()
    again = await fill(teacher, plan_targets(cache, teacher), PLAN)
    assert (again.shards_committed, again.shards_before, teacher.scored) == (0, corpus.num_shards, [])


async def test_batches_hold_whole_rows_up_to_the_budget_and_wait_at_the_teacher_in_bounded_number(
    tmp_path: Path,
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    sizes: list[int] = []
    waiting = most = 0

    class Watching(FakeTeacher):
        async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            sizes.append(sum(map(len, rows)))
            try:
                await asyncio.sleep(0.03)
                return await super().score(rows, want)
            finally:
                waiting -= 1

    teacher = Watching(teacher_for(corpus).identity)
    await fill(teacher, plan_targets(cache, teacher), FillPlan(batch_tokens=120, in_flight=3))
    assert max(sizes) <= 120
    assert sum(sizes) == corpus.num_positions
    assert most == 3


def run_job(root: Path, tokens_per_second: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fill_job", str(root), str(tokens_per_second)]
    cwd = Path(__file__).resolve().parent.parent
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd)


def test_killed_in_the_middle_and_run_again_it_ends_with_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    texts = topics(30)
    undisturbed, corpus = make_corpus(tmp_path / "whole", texts=texts)
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, plan_targets(undisturbed, teacher), PLAN))

    cache, _ = make_corpus(tmp_path / "killed", texts=texts)
    kept: dict[tuple[int, str], bytes] = {}
    rng = random.Random(7)
    for _ in range(3):
        with run_job(tmp_path / "killed", 20_000) as job:
            assert job.stdout is not None
            # Past the first commit of this run, then at a random moment.
            while int((job.stdout.readline() or "1").split()[0]) < 1:
                pass
            time.sleep(rng.random() * 0.2)
            job.send_signal(signal.SIGKILL)
        now = segment_bytes(cache)
        assert {name: now[name] for name in kept} == kept, "a committed segment changed"
        kept = now
    assert kept, "the job was killed before its first commit"
    with run_job(tmp_path / "killed", 0) as job:
        job.communicate()
    assert job.returncode == 0
    final = segment_bytes(cache)
    assert {name: final[name] for name in kept} == kept
    assert final == segment_bytes(undisturbed)
    targets = cache.targets("fake", "docs")
    assert all(targets.corrupt_objects(shard) == [] for shard in range(corpus.num_shards))


def test_two_jobs_at_once_leave_one_commit_a_shard(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    jobs = [run_job(tmp_path / "c", 0) for _ in range(2)]
    for job in jobs:
        job.communicate()
        assert job.returncode == 0
    targets = cache.targets("fake", "docs")
    assert targets.committed.all()
    assert all(targets.corrupt_objects(shard) == [] for shard in range(corpus.num_shards))
    assert find_garbage(cache.root, min_age_seconds=0) == []


async def test_cancelled_it_commits_the_shard_being_written_and_no_other(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", texts=topics(20))
    teacher = teacher_for(corpus, tokens_per_second=20_000)
    reached = asyncio.Event()

    def on_progress(at: FillProgress) -> None:
        if at.shards_committed >= 2:
            reached.set()

    job = asyncio.create_task(fill(teacher, plan_targets(cache, teacher), PLAN, on_progress=on_progress))
    await reached.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    targets = cache.targets("fake", "docs")
    assert 2 <= targets.committed.sum() < corpus.num_shards
    assert find_garbage(cache.root, min_age_seconds=0) == []


async def test_cancelled_during_the_last_write_it_commits_and_is_cancelled_all_the_same(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", shard_positions=100_000)
    teacher = teacher_for(corpus)
    scored = asyncio.Event()

    def on_progress(at: FillProgress) -> None:
        if at.positions_scored == at.positions and not at.shards_committed:
            scored.set()

    job = asyncio.create_task(fill(teacher, plan_targets(cache, teacher), PLAN, on_progress=on_progress))
    await scored.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert cache.targets("fake", "docs").committed.all()


class Broken(FakeTeacher):
    """Answers well a few times, then as told."""

    def __init__(self, base: FakeTeacher, *, good: int, error: Exception | None = None) -> None:
        super().__init__(base.identity)
        self._good = good
        self._error = error

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        answers = await super().score(rows, want)
        self._good -= 1
        if self._good >= 0:
            return answers
        if self._error:
            raise self._error
        return answers[:-1]


@pytest.mark.parametrize("error", [TeacherFailed("the engine died"), None])
async def test_a_teacher_that_fails_stops_the_fill_and_keeps_what_was_committed(
    tmp_path: Path, error: Exception | None
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = Broken(teacher_for(corpus), good=12, error=error)
    with pytest.raises(TeacherFailed, match="the engine died" if error else "other rows"):
        await fill(teacher, plan_targets(cache, teacher), PLAN)
    committed = cache.targets("fake", "docs").committed
    assert 0 < committed.sum() < corpus.num_shards
    good = teacher_for(corpus)
    await fill(good, plan_targets(cache, good), PLAN)
    assert cache.targets("fake", "docs").committed.all()


FULL_DISK = """
import asyncio, resource, signal, sys
from cache import Cache
from cache.errors import StoreError
from cache.fill import FillPlan, fill
from tests.corpora import plan_targets, teacher_for
cache = Cache.open(sys.argv[1], mode="r+")
teacher = teacher_for(cache.corpus("docs"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    asyncio.run(fill(teacher, plan_targets(cache, teacher, k=64), FillPlan()))
except StoreError as error:
    print(error.kind, error.detail)
"""


def test_a_store_that_takes_no_more_bytes_leaves_the_shard_uncommitted_and_says_so(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", shard_positions=2000)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert done.stdout.startswith("store targets/fake/docs/segments/000000-")
    assert "free space or mend access, then run it again" in done.stdout
    targets: TargetSet = cache.targets("fake", "docs")
    assert not targets.committed.any()
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, plan_targets(cache, teacher, k=64), PLAN))
    assert cache.targets("fake", "docs").committed.all()


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--batch-tokens is 0"):
        FillPlan(batch_tokens=0)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
