"""The study's teachers: what they say of the sample, and the second one, which is trained here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import numpy as np

from benchmarks.study.corpora import SAMPLE, SPECIALIST
from benchmarks.study.plan import FEWER_DRAWS, SECOND, TEACHER, Plan
from potstill.cache import Cache
from potstill.cache.entry_points import open_teacher
from potstill.cache.errors import TeacherFailed
from potstill.cache.fill import FillPlan, FillProgress, fill
from potstill.cache.types import Draws, Fields, Provenance, Targets, Teacher
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.train.loop import train

Opener: TypeAlias = Callable[[str], AbstractAsyncContextManager[Teacher]]
"""Opens the teacher in a folder."""
_POLL_SECONDS = 0.5


class Stopped(Exception):
    """Raised in a stage that was asked to stop."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Settings by which teachers are asked."""

    folder: Path
    """The study's, with the cache."""
    should_stop: Callable[[], bool]
    opener: Opener | None = None
    """By default each runs in an engine in a process of its own, as an engine binds its process's threads to cores."""

    def fill(self, name: str, model: Path, fields: Fields) -> None:
        """Fill a teacher's targets of the sample, where some are not there.

        Raises:
            Stopped: committed shards stay, and the next call goes on. PotstillError: as `fill`.
        """
        if self.opener is not None:
            asyncio.run(_filled(self.folder, name, model, fields, self.opener))
            return
        process = get_context("spawn").Process(target=_fill, args=(self.folder, name, model, fields), daemon=True)
        process.start()
        while process.is_alive() and not self.should_stop():
            process.join(_POLL_SECONDS)
        if process.is_alive():
            process.terminate()
            process.join()
            raise Stopped
        if process.exitcode:
            raise TeacherFailed(f"the process that asks {name!r} ended with status {process.exitcode}; see above")


def _fill(folder: Path, name: str, model: Path, fields: Fields) -> None:
    asyncio.run(_filled(folder, name, model, fields, open_teacher))


async def _filled(folder: Path, name: str, model: Path, fields: Fields, opener: Opener) -> None:
    cache, began = Cache.open(folder / "cache", mode="r+"), time.monotonic()

    def on_progress(at: FillProgress) -> None:
        speed = at.positions_scored / (time.monotonic() - began)
        print(f"{name}: {at.shards_committed}/{at.shards} shards, {speed:.0f} tokens/s", flush=True)

    async with opener(str(model)) as teacher:
        targets = cache.plan_targets(name, SAMPLE, teacher.identity, fields=fields)
        await fill(teacher, targets, FillPlan(batch_tokens=1024, in_flight=2), on_progress=on_progress)


def prepare_first(plan: Plan, cache: Cache, model: Path, scoring: Scoring) -> None:
    """Fill the first teacher's targets, all fields in one pass, and those with fewer draws.

    Raises:
        Stopped, PotstillError: as `Scoring.fill`.
    """
    if not is_filled(cache, TEACHER):
        scoring.fill(TEACHER, model, Fields(k=plan.k, draws=plan.draws, seed=plan.seed, dense=True))
    if not is_filled(cache, FEWER_DRAWS):
        _keep_fewer(plan, cache)


def prepare_second(plan: Plan, cache: Cache, model: Path, scoring: Scoring) -> None:
    """Train the first teacher on code, by cross-entropy, and fill the top-k of what comes of it.

    Raises:
        Stopped, PotstillError: as `train` and `Scoring.fill`.
    """
    if is_filled(cache, SECOND):
        return
    steps = plan.specialist_steps
    config = TrainConfig.of(
        {
            "data": {"cache": str(scoring.folder / "cache"), "corpus": SPECIALIST, "held_out": 0},
            "student": {"checkpoint": str(model)},
            "train": {
                "out": str(scoring.folder / "specialist"),
                "steps": steps,
                "batch_rows": 4,
                "micro_batch_rows": 2,
                "lr": plan.specialist_lr,
                "warmup": steps // 8,
                "alpha": 0.0,
                "seed": plan.seed,
                "checkpoint_every": 8,
                "keep_checkpoints": 1,
            },
        }
    )
    if not train(config, should_stop=scoring.should_stop).finished:
        raise Stopped
    scoring.fill(SECOND, config.run_dir / "model", Fields(k=plan.k))


def is_filled(cache: Cache, name: str) -> bool:
    """Tell whether a teacher has targets of all of the sample."""
    return name in cache.teachers(SAMPLE) and bool(cache.targets(name, SAMPLE).committed.all())


def _keep_fewer(plan: Plan, cache: Cache) -> None:
    """Keep some of the draws, chosen by chance, under a name of their own: they are draws as independent as all."""
    source = cache.targets(TEACHER, SAMPLE)
    fields = Fields(k=plan.k, draws=plan.fewer_draws, seed=plan.seed)
    kept = cache.plan_targets(FEWER_DRAWS, SAMPLE, source.identity, fields=fields)
    starts = cache.corpus(SAMPLE).shard_starts
    every = Fields(k=plan.k, draws=plan.draws, seed=plan.seed)
    provenance = Provenance(
        engine="potstill", engine_version="", device="cpu", capture_path=f"{plan.fewer_draws} of {plan.draws} draws"
    )
    if pilot := kept.pilot_rows():
        kept.make_ranks(Targets.concat(source.read_rows(pilot, fields=Fields(k=plan.k))))
    for shard in np.flatnonzero(~kept.committed).tolist():
        found = source.read(int(starts[shard]), int(starts[shard + 1]), fields=every)
        assert found.draws is not None, "asked for"
        fewer = some_of(found.draws, plan.fewer_draws, np.random.default_rng([plan.seed, shard]))
        kept.write_shard(shard, replace(found, draws=fewer), provenance)


def some_of(draws: Draws, number: int, random: np.random.Generator) -> Draws:
    """Choose `number` draws of each position, without replacement."""
    ids, counts = [], []
    for start, stop in zip(draws.offsets[:-1].tolist(), draws.offsets[1:].tolist(), strict=True):
        chosen = random.multivariate_hypergeometric(draws.counts[start:stop].astype(np.int64), number)
        ids.append(draws.ids[start:stop][chosen > 0])
        counts.append(chosen[chosen > 0].astype(np.uint16))
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in ids])]).astype(np.int64)
    return Draws(offsets, np.concatenate(ids), np.concatenate(counts))
