"""Kills of one kind of job at random moments, and sleeps of it past `gc`; see `kill_jobs`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.support.kill_jobs import JOBS, Count, Job, collect, problems, process
from potstill.cache import Cache

_LONGEST = 180.0
"""Seconds after which a job that neither ends nor stops has failed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Root of the cache, environment of the processes that work there, and how they are started."""

    url: str
    environment: Mapping[str, str]
    context: Any


@dataclass(slots=True)
class _Tally:
    kills: int = 0
    sleeps: int = 0
    rounds: int = 0
    garbage: int = 0
    wrong: list[str] = field(default_factory=list)


def disturb(place: Place, job: Job, rng: random.Random, wanted: int) -> bool:
    """Kill a job `wanted` times, and let it sleep past `gc` as often; print the outcome, True when nothing was lost."""
    tally, began = _Tally(), time.monotonic()
    while not tally.wrong and min(tally.kills, tally.sleeps) < wanted:
        for need in job.needs:
            need(Cache.open(place.url, mode="r+"), Count())
        done, longest = place.context.RawValue("i", 0), 0.1
        while not tally.wrong and done.value < job.target:
            asleep = tally.sleeps < wanted and (tally.kills >= wanted or rng.random() < 0.5)
            arguments = (place.url, place.environment, JOBS.index(job), done, 0.3 * asleep, rng.randrange(1 << 30))
            child = place.context.Process(target=process, args=arguments)
            child.start()
            if asleep:
                _wake_after_gc(place, child, tally)
            else:
                child.join(rng.uniform(0, longest))
                longest = min(1.5 * longest, 6.0)
                tally.kills += child.is_alive()
            child.kill()
            child.join()
            if child.exitcode not in (0, -signal.SIGKILL):
                tally.wrong.append(f"it ended with exit code {child.exitcode}")
            _check(place, job, done.value, tally)
        tally.rounds += 1
        for folder in ("targets", "corpora", "journal", "claims"):
            Cache.open(place.url, mode="r+").root.delete(folder)
    print(
        f"  {job.name}: {tally.kills} kills and {tally.sleeps} sleeps past gc in {tally.rounds} rounds, "
        f"{tally.garbage} groups removed by gc, {time.monotonic() - began:.0f} s"
        f"{'' if tally.wrong else ': nothing lost or broken'}",
        flush=True,
    )
    for line in tally.wrong[:20]:
        print(f"    WRONG: {line}")
    return not tally.wrong


def _wake_after_gc(place: Place, child: Any, tally: _Tally) -> None:
    """Whenever the job stops itself, remove all garbage and wake it, until it ends."""
    end = time.monotonic() + _LONGEST
    while child.is_alive():
        if time.monotonic() > end:
            tally.wrong.append(f"it did not end in {_LONGEST:g} s")
            return
        if _is_stopped(child.pid):
            tally.garbage += collect(place.url)
            tally.sleeps += 1
            os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.002)


def _check(place: Place, job: Job, done: int, tally: _Tally) -> None:
    """Look for damage and loss as the job was left, and again without its garbage."""
    tally.wrong += problems(place.url, job, done)
    tally.garbage += collect(place.url)
    tally.wrong += problems(place.url, job, done)


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
