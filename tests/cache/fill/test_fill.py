from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields, Targets
from potstill.cache.errors import InvalidInput, StoreError, TeacherFailed
from potstill.cache.fill.loop import FillPlan, FillProgress, fill
from potstill.cache.targets.ranks import pilot_rows
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Tokens
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from potstill.clients.cli import main
from tests.support.corpora import make_corpus, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher
from tests.support.processes.fill_job import (
    assert_whole,
    begin_together,
    fill_job,
    report_of,
    row_name,
    segment_bytes,
    step_of,
)
from tests.support.processes.forked import Forked
from tests.support.waiting import eventually

PLAN = FillPlan(batch_tokens=200, in_flight=2)
# No ids are kept, so there is no rank table, and no pilot that is scored before the first shard.
NO_PILOT = Fields(k=0, entropy=True)


async def test_a_fill_commits_every_shard_and_a_second_one_finds_nothing_to_do(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    seen: list[FillProgress] = []
    report = await fill(teacher, plan_targets(cache, teacher), PLAN, on_progress=seen.append)
    assert report.shards_committed == corpus.num_shards
    assert report.positions_scored == corpus.num_positions
    assert sorted(teacher.scored) == sorted(corpus.row(row).tobytes() for row in range(len(corpus)))
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


def test_killed_in_the_middle_and_run_again_it_ends_with_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    texts = topics(20)
    undisturbed, corpus = make_corpus(tmp_path / "whole", texts=texts)
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, plan_targets(undisturbed, teacher), PLAN))

    cache, _ = make_corpus(tmp_path / "killed", texts=texts)
    kept: dict[tuple[str, int, str], bytes] = {}
    rng = random.Random(7)
    for _ in range(3):
        with fill_job(tmp_path / "killed", "--tokens-per-second", 5000) as job:
            # Past the first commit of this run, then at a random moment.
            while step_of(job)["shards_committed"] < 1:
                pass
            time.sleep(rng.random() * 0.2)
            job.send_signal(signal.SIGKILL)
        now = segment_bytes(cache)
        assert {name: now[name] for name in kept} == kept, "a committed segment changed"
        kept = now
    assert kept, "the job was killed before its first commit"
    with fill_job(tmp_path / "killed") as job:
        report_of(job)
    final = segment_bytes(cache)
    assert {name: final[name] for name in kept} == kept
    assert final == segment_bytes(undisturbed)
    for garbage in find_garbage(cache.root, min_age_seconds=0):
        remove_garbage(cache.root, garbage)
    assert_whole(cache)


def test_two_jobs_share_the_work_and_score_nothing_twice(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", texts=topics(20))
    options = ("--fields", json.dumps(NO_PILOT.to_json()), "--tokens-per-second", 3000, "--told")
    with fill_job(tmp_path / "c", *options) as first, fill_job(tmp_path / "c", *options) as second:
        begin_together(first, second)
        reports = [report_of(first), report_of(second)]
    assert_whole(cache)
    assert sum(report["shards_committed"] for report in reports) == corpus.num_shards
    assert all(report["shards_committed"] >= 2 for report in reports)
    assert all(report["shards_lost"] == 0 for report in reports)
    rows = [row for report in reports for row in report["rows"]]
    assert len(rows) == len(corpus)
    assert len(rows) == len(set(rows)), "the texts have no two equal rows"


def test_the_pilot_is_scored_by_one_of_two_jobs_while_the_other_waits(tmp_path: Path) -> None:
    texts = topics(20)
    undisturbed, corpus = make_corpus(tmp_path / "whole", texts=texts)
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, plan_targets(undisturbed, teacher), PLAN))
    cache, _ = make_corpus(tmp_path / "c", texts=texts)
    options = ("--tokens-per-second", 20_000, "--told")
    with fill_job(tmp_path / "c", *options) as first, fill_job(tmp_path / "c", *options) as second:
        begin_together(first, second)
        reports = [report_of(first), report_of(second)]
    assert_whole(cache)
    assert segment_bytes(cache) == segment_bytes(undisturbed)
    assert sum(report["shards_committed"] for report in reports) == corpus.num_shards
    pilot = [row_name(corpus.row(row)) for row in pilot_rows(corpus, Fields(k=16))]
    assert sorted(report["rows"][: len(pilot)] == pilot for report in reports) == [False, True]
    # Who scored the pilot keeps its targets; the other job scores such a row again only in a shard of its own.
    assert all(len(set(report["rows"])) == len(report["rows"]) for report in reports)


def test_a_killed_jobs_shards_are_taken_over_at_once_by_who_waits_for_them(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", shard_positions=100_000)
    with fill_job(tmp_path / "c", "--tokens-per-second", 10, "--claim-seconds", 1000) as slow:
        while not cache.root.objects("targets/fake/docs/claims"):
            time.sleep(0.01)
        with fill_job(tmp_path / "c", "--claim-seconds", 1000) as other:
            while not step_of(other)["waiting_for"]:
                pass
            slow.send_signal(signal.SIGKILL)
            report = report_of(other)
    assert report["shards_committed"] == corpus.num_shards == 1
    assert_whole(cache)


def test_a_job_stopped_past_its_claim_loses_and_cleans_up_when_it_wakes(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", texts=topics(20), shard_positions=3000)
    with fill_job(tmp_path / "c", "--tokens-per-second", 3000, "--claim-seconds", 1) as stalled:
        while step_of(stalled)["shards_committed"] < 1:
            pass
        stalled.send_signal(signal.SIGSTOP)
        with fill_job(tmp_path / "c", "--claim-seconds", 1) as other:
            report = report_of(other)
        assert report["shards_committed"] >= 1
        final = segment_bytes(cache)
        assert cache.targets("fake", "docs").committed.all()
        stalled.send_signal(signal.SIGCONT)
        late = report_of(stalled)
    assert late["shards_elsewhere"] >= 1
    assert late["shards_committed"] + late["shards_elsewhere"] == corpus.num_shards
    assert segment_bytes(cache) == final
    assert_whole(cache)


class Stalling(FakeTeacher):
    """Goes on with its second shard only when told, whatever happens to its claim meanwhile."""

    def __init__(self, base: FakeTeacher, until: asyncio.Event) -> None:
        super().__init__(base.identity)
        self._until = until
        self.reached = asyncio.Event()

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        if len(self.scored) > 20:
            self.reached.set()
            await self._until.wait()
        return await super().score(rows, want)


async def test_a_shard_taken_over_while_it_is_scored_is_lost_without_a_trace(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    resumed = asyncio.Event()
    stalling = Stalling(teacher_for(corpus), resumed)
    targets = cache.plan_targets("fake", "docs", stalling.identity, fields=NO_PILOT)
    job = asyncio.create_task(fill(stalling, targets, FillPlan(batch_tokens=200, claim_seconds=1000)))
    await stalling.reached.wait()
    # The first shard is scored, and may still be on its way to its commit.
    await eventually(lambda: not any(name.startswith("000000") for name in cache.root.objects(targets.claims_path)))
    held = cache.root.objects(targets.claims_path)
    assert held
    for name in held:
        stem, generation = name.removesuffix(".json").split("-")
        cache.root.create(f"{targets.claims_path}/{stem}-{int(generation) + 1:04d}.json", b"another job's")
    good = teacher_for(corpus)
    other = cache.plan_targets("fake", "docs", good.identity, fields=NO_PILOT)
    for name in held:
        shard = int(name.split("-")[0])
        rows = corpus.rows(*(int(row) for row in corpus.shard_rows[shard : shard + 2]))
        other.write_shard(shard, Targets.concat(await good.score(rows, NO_PILOT)), good.provenance)
        cache.root.delete(targets.claims_path)
    resumed.set()
    report = await job
    assert report.shards_lost == len(held)
    assert report.shards_committed + report.shards_lost == corpus.num_shards
    assert_whole(cache)


async def test_fields_added_later_are_filled_into_a_set_of_their_own(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    await fill(teacher, plan_targets(cache, teacher), PLAN)
    before = segment_bytes(cache)
    wanted = Fields(k=16, draws=20, seed=3, entropy=True, temperatures=(2.0,))
    added = cache.plan_targets("fake", "docs", teacher.identity, fields=wanted)
    assert added.fields == Fields(k=0, draws=20, seed=3, entropy=True, temperatures=(2.0,))
    await fill(teacher, added, PLAN)
    after = segment_bytes(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    found = cache.targets("fake", "docs").read_rows([3])[0]
    exact = teacher.targets(corpus.row(3), wanted)
    assert found.draws is not None
    assert exact.draws is not None
    assert np.array_equal(found.draws.ids, exact.draws.ids)
    assert np.array_equal(found.ids, exact.ids)
    assert_whole(cache)


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

    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=NO_PILOT)
    job = asyncio.create_task(fill(teacher, targets, PLAN, on_progress=on_progress))
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
        await fill(teacher, cache.plan_targets("fake", "docs", teacher.identity, fields=NO_PILOT), PLAN)
    committed = cache.targets("fake", "docs").committed
    assert 0 < committed.sum() < corpus.num_shards
    good = teacher_for(corpus)
    await fill(good, cache.plan_targets("fake", "docs", good.identity, fields=NO_PILOT), PLAN)
    assert_whole(cache)


def fill_a_full_disk(root: Path) -> None:
    cache = Cache.open(root, mode="r+")
    teacher = teacher_for(cache.corpus("docs"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    try:
        asyncio.run(fill(teacher, plan_targets(cache, teacher, k=64), FillPlan()))
    except StoreError as error:
        print(error.kind, error.detail)


def test_a_store_that_takes_no_more_bytes_leaves_the_shard_uncommitted_and_says_so(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "c", shard_positions=2000)
    with Forked(fill_a_full_disk, tmp_path / "c") as process:
        told, errors = process.communicate()
    assert process.returncode == 0, errors
    assert told.startswith("store shard 0 stays uncommitted: targets/fake/docs/segments/000000-")
    assert "free space or mend access, then run it again" in told
    targets: TargetSet = cache.targets("fake", "docs")
    assert not targets.committed.any()
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, plan_targets(cache, teacher, k=64), PLAN))
    assert cache.targets("fake", "docs").committed.all()


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--batch-tokens is 0"):
        FillPlan(batch_tokens=0)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_prefill_with_nothing_to_do_does_not_open_its_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, corpus = make_corpus(tmp_path / "c")
    teacher = teacher_for(corpus)
    asyncio.run(fill(teacher, cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=16)), PLAN))
    arguments = ["prefill", "--cache", str(tmp_path / "c"), "--corpus", "docs", "--teacher", "fake=/no/model"]
    assert main([*arguments, "--top-k", "16"]) == 0
    out = capsys.readouterr().out
    assert f"{corpus.num_shards} of {corpus.num_shards} shards committed" in out
    assert "nothing to do; /no/model was not opened" in out
    for more, kind in (
        (["--top-k", "8"], "spec_mismatch"),
        (["--top-k", "16", "--encoding", "f32"], "spec_mismatch"),
        (["--top-k", "16", "--draws", "5", "--entropy"], "invalid_input: there is no model folder"),
        (["--top-k", "16", "--claim-seconds", "0"], "invalid_input: --claim-seconds is 0"),
    ):
        assert main([*arguments, *more]) == 1
        assert capsys.readouterr().err.startswith(kind)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--temperatures", "2,warm"])
    assert "'2,warm' is not a list of numbers like 2,4" in capsys.readouterr().err
