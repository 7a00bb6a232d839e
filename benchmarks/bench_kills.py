"""Kill and stall the writers of a multi-writer job again and again: nothing committed is ever wrong or changes.

Several processes fill one target set with a FakeTeacher. They are SIGKILLed at random moments, or stopped past their
claims and woken. Every other kill waits for the phase that was hit least so far, so that all are hit. A
complete set is compared with an undisturbed run's bytes, removed, and filled again, until the kills are done. Exits
1 when a committed segment does not verify or changed, when the bytes differ, or when a writer fails.

An ingest, a service's journal, a compaction and a fill are each killed at random moments too, or stop right before a
record and sleep while `gc` removes all garbage however young; then they are run again. Exits 1 when anything published
is broken, or a row that was kept is not answered as at first.

    python -m benchmarks.bench_kills [--kills 500] [--stalls 20] [--store local|s3|both] [--writers 3] [--job-kills 200]
        [--jobs ingest journal compact fill]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import job_kills
from benchmarks.support.kill_jobs import JOBS
from benchmarks.support.kill_writer import CLAIM_SECONDS, PHASES, PLAN, writer
from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.fill.loop import fill
from potstill.cache.store.root import Root
from potstill.cache.targets import segment_set
from potstill.cache.targets.commit import segment_path
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from potstill.cache.upkeep.integrity import corrupt_shard_objects, corrupt_shared_objects
from tests.support.corpora import byte_tokenizer, plan_targets, teacher_for, topics, write_texts
from tests.support.processes.s3 import s3_server

CONTEXT = multiprocessing.get_context("forkserver")

Objects = dict[str, str]
"""The sha256 of each object of one shard, by its path within the segment."""


@dataclass
class Writer:
    process: Any
    phases: Any
    wake_at: float = 0.0
    """When it is to be woken; 0 while it runs."""


@dataclass
class Run:
    """The writers at one root, and what is known to be committed there."""

    url: str
    environment: Mapping[str, str]
    reference: dict[int, Objects]
    rng: random.Random
    writers: list[Writer] = field(default_factory=list)
    known: dict[int, Objects] = field(default_factory=dict)
    hits: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    stalls: int = 0
    rounds: int = 0
    garbage: int = 0
    problems: list[str] = field(default_factory=list)
    lost: Any = field(default_factory=lambda: CONTEXT.RawValue("i", 0))

    def keep(self, count: int) -> bool:
        """Replace killed writers; False once one of them ended because the set was complete."""
        done = False
        for each in list(self.writers):
            if each.process.exitcode is not None:
                self.writers.remove(each)
                done |= each.process.exitcode == 0
                if each.process.exitcode not in (0, -signal.SIGKILL):
                    self.problems.append(f"a writer ended with exit code {each.process.exitcode}")
            elif each.wake_at and time.monotonic() > each.wake_at:
                os.kill(each.process.pid, signal.SIGCONT)
                each.wake_at = 0.0
        while not done and len(self.writers) < count:
            phases = CONTEXT.RawArray("i", len(PHASES))
            process = CONTEXT.Process(target=writer, args=(self.url, self.environment, phases, self.lost))
            process.start()
            self.writers.append(Writer(process, phases))
        return not done

    def kill(self, *, aimed: bool) -> None:
        """Kill a running writer: at once, or in the phase that was hit least, if one comes to it soon."""
        victim = self._in_phase(min(PHASES, key=lambda phase: self.hits[phase])) if aimed else None
        running = [each for each in self.writers if not each.wake_at and each.process.exitcode is None]
        victim = victim or (self.rng.choice(running) if running else None)
        if victim is None:
            return
        os.kill(victim.process.pid, signal.SIGKILL)
        victim.process.join()
        if victim.process.exitcode == -signal.SIGKILL:
            self.kills += 1
            at = [phase for phase, count in zip(PHASES, victim.phases, strict=True) if count]
            self.hits.update(at or ["between"])

    def stall(self) -> None:
        """Stop a writer that holds a claim for longer than the claim lasts."""
        victim = self._in_phase(self.rng.choice(("score", "encode", "write", "commit")))
        if victim is not None:
            os.kill(victim.process.pid, signal.SIGSTOP)
            victim.wake_at = time.monotonic() + CLAIM_SECONDS * (1.2 + self.rng.random())
            self.stalls += 1

    def check(self, *, everything: bool) -> None:
        """New commits verify; what was committed before has the same bytes (all of it, or one shard in ten)."""
        cache = Cache.open(self.url)
        if not cache.teachers("docs"):
            return
        targets = cache.targets("fake", "docs").sets[0]
        for shard in np.flatnonzero(targets.commits.committed).tolist():
            if shard in self.known and not everything and self.rng.random() > 0.1:
                continue
            self.problems += corrupt_shard_objects(targets, shard)
            now = object_hashes(cache.root, targets, shard)
            if self.known.setdefault(shard, now) != now:
                self.problems.append(f"shard {shard} changed after it was committed")
            if now != self.reference[shard]:
                self.problems.append(f"shard {shard} is not what an undisturbed run writes")

    def finish_round(self) -> None:
        """The set is complete: compare all of it, look at what was left behind, and begin anew."""
        for each in self.writers:
            if each.wake_at:
                os.kill(each.process.pid, signal.SIGCONT)
            each.process.join()
            if each.process.exitcode != 0:
                self.problems.append(f"a writer ended with exit code {each.process.exitcode}")
        self.writers.clear()
        self.check(everything=True)
        cache = Cache.open(self.url, mode="r+")
        if self.known.keys() != self.reference.keys():
            self.problems.append(f"{len(self.known)} of {len(self.reference)} shards are committed")
        garbage = find_garbage(cache.root, min_age_seconds=-60)
        self.garbage += len(garbage)
        for item in garbage:
            remove_garbage(cache.root, item)
        self.problems += corrupt_shared_objects(cache.targets("fake", "docs").sets[0])
        if {shard: object_hashes(cache.root, cache.targets("fake", "docs").sets[0], shard) for shard in self.known} != (
            self.reference
        ):
            self.problems.append("removing the garbage removed what was committed")
        cache.root.delete("targets")
        self.known.clear()
        self.rounds += 1

    def _in_phase(self, phase: str) -> Writer | None:
        index, deadline = PHASES.index(phase), time.monotonic() + 1.5
        while time.monotonic() < deadline:
            for each in self.writers:
                if each.phases[index] and not each.wake_at:
                    return each
            time.sleep(0.0005)
        return None


def object_hashes(root: Root, targets: segment_set.SegmentSet, shard: int) -> Objects:
    commit = targets.commits.of(shard)
    assert commit is not None
    paths = {item.path: f"{segment_path(targets.path, commit.segment)}/{item.path}" for item in commit.objects}
    return {path: hashlib.sha256(root.get(full) or b"").hexdigest() for path, full in paths.items()}


def make_corpus(url: str, folder: Path) -> Cache:
    cache = Cache.open(url, mode="r+")
    source = write_texts(folder / "text", topics(12, characters=1500))
    ingest(cache.root, "docs", [source], byte_tokenizer(), IngestPlan(row_tokens=50, shard_positions=700))
    return cache


def undisturbed(folder: Path) -> dict[int, Objects]:
    cache = make_corpus(str(folder / "undisturbed"), folder)
    teacher = teacher_for(cache.corpus("docs"))
    asyncio.run(fill(teacher, plan_targets(cache, teacher), PLAN))
    targets = cache.targets("fake", "docs").sets[0]
    return {shard: object_hashes(cache.root, targets, shard) for shard in range(targets.corpus.num_shards)}


def disturb(run: Run, kills: int, stalls: int, writers: int) -> None:
    """Kill and stall until it is enough, then let the last round end."""
    began = shown = time.monotonic()
    stall_at = set(run.rng.sample(range(1, max(kills, 2)), min(stalls, kills - 1))) if stalls else set()
    while not run.problems:
        if not run.keep(writers):
            run.finish_round()
            if run.kills >= kills:
                return
            continue
        if run.kills in stall_at:
            stall_at.discard(run.kills)
            run.stall()
        time.sleep(run.rng.expovariate(1 / 0.2))
        if run.kills < kills:
            run.kill(aimed=run.kills % 2 == 1)
            run.check(everything=run.kills % 10 == 0)
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"  {run.kills} kills, {run.rounds} rounds, {shown - began:.0f} s", flush=True)


def measure(name: str, run: Run, kills: int, stalls: int, writers: int) -> bool:
    began = time.monotonic()
    try:
        disturb(run, kills, stalls, writers)
    finally:
        for each in run.writers:
            each.process.kill()
    seconds = time.monotonic() - began
    hits = ", ".join(f"{phase} {run.hits[phase]}" for phase in (*PHASES, "between"))
    print(
        f"{name}: {run.kills} kills and {run.stalls} stalls of {writers} writers in {run.rounds} rounds of "
        f"{len(run.reference)} shards, {seconds:.0f} s; {run.lost.value} shards lost to another job by who lived to "
        f"say so; {run.garbage} abandoned groups, removed by gc\n  kills that hit a phase (several at once count "
        f"each): {hits}"
    )
    for problem in run.problems[:20]:
        print(f"  WRONG: {problem}")
    if not run.problems:
        print("  every committed segment verified, none changed, every round ended with an undisturbed run's bytes")
    return not run.problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--stalls", type=int, default=20)
    parser.add_argument("--store", choices=("local", "s3", "both"), default="both")
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--job-kills", type=int, default=200, help="of each kind of job, and as many sleeps past gc")
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    CONTEXT.set_forkserver_preload(
        [
            "zarr",
            "potstill.cache.fill.loop",
            "potstill.cache.cache",
            "tests.support.corpora",
            "benchmarks.support.kill_jobs",
            "benchmarks.support.kill_writer",
        ]
    )
    # A killed process cannot hand back its semaphores; their tracker does it at the end, and warns.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = undisturbed(folder)
        roots: dict[str, Callable[[], tuple[str, dict[str, str]]]] = {"local": lambda: (str(folder / "killed"), {})}
        if args.store != "local":
            server = stack.enter_context(s3_server())
            os.environ.update(server.environment())
            roots["s3"] = lambda: (server.new_bucket(), server.environment())
        good = []
        for name in roots if args.store == "both" else [args.store]:
            url, environment = roots[name]()
            place = job_kills.Place(f"{url}-jobs", environment, CONTEXT)
            if args.job_kills:
                jobs = [job for job in JOBS if job.name in args.jobs]
                good += [job_kills.disturb(place, each, random.Random(args.seed), args.job_kills) for each in jobs]
            if not args.kills:
                continue
            make_corpus(url, folder)
            run = Run(url, environment, reference, random.Random(args.seed))
            good.append(measure(name, run, args.kills, args.stalls, args.writers))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
