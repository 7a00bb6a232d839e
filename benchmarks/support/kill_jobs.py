"""Jobs that are made to be killed, or to sleep past `gc`: an ingest, a service's journal, a compaction, a fill.

Each is run again until it is done, as a person would. What it acknowledged must be there after every stop.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.keys import row_key
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.encoding import decode, encode
from potstill.cache.encoding.logprobs import ENCODINGS, RankTable
from potstill.cache.errors import AlreadyExists, NotFound, PotstillError, StoreError
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.journal import Journal, JournalPolicy
from potstill.cache.journal.compact import CompactPlan, compact
from potstill.cache.journal.segment import JournalRow
from potstill.cache.read_through.known_targets import KnownTargets
from potstill.cache.store.root import Root
from potstill.cache.types import Tokens
from potstill.cache.upkeep.garbage import find_garbage, remove_garbage
from potstill.cache.upkeep.integrity import check_cache
from tests.support.corpora import VOCAB, byte_tokenizer, plan_targets, teacher_for, topics
from tests.support.fakes import FakeTeacher, fake_identity

K = 16
BATCHES = 36
"""Flushes of the journal in one round; more than 16 segments are joined."""
_TOKENIZER = byte_tokenizer()
_TEACHER = FakeTeacher(fake_identity(vocab_size=VOCAB, tokenizer_sha256=fingerprint(_TOKENIZER)))
_RANKS = RankTable.plain(VOCAB)
_U8 = ENCODINGS["u8"]
_RECORDS = ("/commits/", "ranks.json", "manifest.json", "zarr.json", "/smol-", "annotations/")


def rows() -> list[Tokens]:
    """Rows of text, two for each batch of the journal."""
    text = [_TOKENIZER.encode(each).ids for each in topics(2 * BATCHES, characters=400)]
    return [np.array([number % VOCAB, *ids[: 20 + number]], np.uint32) for number, ids in enumerate(text)]


ROWS = rows()
KEYS = [row_key(_TEACHER.identity.tokenizer_sha256, each) for each in ROWS]


def kept(number: int) -> JournalRow:
    """A row with its answer, as a service keeps it."""
    return JournalRow.of(KEYS[number], ROWS[number], _TEACHER.distribution(ROWS[number], K), _U8, _RANKS)[0]


def is_answer(number: int, found: Targets | None) -> bool:
    """Tell whether targets are bit by bit what the first answer was."""
    exact = decode(encode(_TEACHER.distribution(ROWS[number], K), _U8, _RANKS), _U8, _RANKS)
    same = ("ids", "logprobs", "log_tail")
    return found is not None and all(np.array_equal(getattr(found, n), getattr(exact, n)) for n in same)


def keep(cache: Cache, done: Any) -> None:
    """A service that keeps two rows at a time, and joins small segments."""
    journal = Journal(cache.root, "smol", _TEACHER.identity, JournalPolicy())
    while done.value < BATCHES:
        journal.add([kept(2 * done.value), kept(2 * done.value + 1)])
        journal.flush(_TEACHER.provenance)
        done.value += 1
        journal.tidy()


def make(cache: Cache, done: Any) -> None:
    """An ingest of all rows."""
    plan = IngestPlan(row_tokens=512, shard_positions=500)
    try:
        ingest_rows(cache.root, "docs", ROWS, _TOKENIZER, plan)
    except AlreadyExists:
        assert len(cache.corpus("docs")) == len(ROWS)
    done.value = 1


def make_of_journal(cache: Cache, done: Any) -> None:
    """A compaction of all that `keep` kept."""
    plan = CompactPlan(teacher="smol", corpus="asked", tokenizer=_TOKENIZER, shard_positions=500)
    try:
        compact(cache, plan)
    except NotFound:
        assert not cache.root.sizes("journal")
    done.value = 1


def score(cache: Cache, done: Any) -> None:
    """A fill of what `make` made."""
    teacher = teacher_for(cache.corpus("docs"))
    asyncio.run(fill(teacher, plan_targets(cache, teacher), FillPlan(batch_tokens=300, claim_seconds=1.0)))
    done.value = 1


@dataclass(frozen=True, slots=True)
class Job:
    """A job, what has to be there before it, and what must never be lost."""

    name: str
    run: Callable[[Cache, Any], None]
    needs: tuple[Callable[[Cache, Any], None], ...] = ()
    acknowledged: Callable[[int], Sequence[int]] = lambda _: ()
    """Rows that must be answered, by what the job says it has done."""
    target: int = 1


JOBS = (
    Job("ingest", make),
    Job("journal", keep, (), lambda done: range(2 * done), BATCHES),
    Job("compact", make_of_journal, (keep,), lambda _: range(len(ROWS))),
    Job("fill", score, (make,)),
)


@dataclass(slots=True)
class Count:
    """Something that has been done so often, in the process that counts."""

    value: int = 0


def process(url: str, environment: Mapping[str, str], number: int, done: Any, pause: float, seed: int) -> None:
    """Run a job; before each record it stops itself with the probability `pause`, until somebody wakes it."""
    os.environ.update(environment)
    if pause:
        _stop_before_records(pause, random.Random(seed))
    for left in reversed(range(100)):
        try:
            JOBS[number].run(Cache.open(url, mode="r+"), done)
        except StoreError:
            if not left:
                raise
        else:
            return


def _stop_before_records(pause: float, rng: random.Random) -> None:
    create = Root.create

    def stopping(self: Root, path: str, data: bytes, *, durable: bool = True) -> bool:
        if any(part in path for part in _RECORDS) and rng.random() < pause:
            os.kill(os.getpid(), signal.SIGSTOP)
        return create(self, path, data, durable=durable)

    Root.create = stopping  # type: ignore[method-assign]


def collect(url: str) -> int:
    """Remove all garbage, however young, as `gc` does a day later; returns how many groups that were."""
    root = Root.open(url)
    return sum(remove_garbage(root, item) for item in find_garbage(root, min_age_seconds=-60.0))


def problems(url: str, job: Job, done: int) -> list[str]:
    """List what is damaged, and what was acknowledged and is not answered as it was at first."""
    cache = Cache.open(url, mode="r+")
    found = [line for checked in check_cache(cache.root) for line in (*checked.problems, checked.unreachable) if line]
    numbers = list(job.acknowledged(done))
    if numbers:
        keys, told = [KEYS[number] for number in numbers], list[PotstillError]()
        here = Journal(cache.root, "smol", _TEACHER.identity, JournalPolicy()).find(keys, K)
        there = KnownTargets(cache, "smol", _TEACHER.identity, told.append).find(keys, Fields(k=K))
        answers = [a if a is not None else b for a, b in zip(here, there, strict=True)]
        found += [f"row {n} is lost or changed" for n, a in zip(numbers, answers, strict=True) if not is_answer(n, a)]
        found += [error.detail for error in told]
    return found
