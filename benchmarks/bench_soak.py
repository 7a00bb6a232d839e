"""Many writers and readers on one root for minutes: every read is compared with the teacher's exact targets.

Writers fill one target set after the other together, each with another encoding and other fields. Readers open, read
random rows and ranges of what is committed right then, and recompute it. Exits 1 on a wrong read, on an error that is
not "not committed yet", or when anything does not verify at the end.

    python -m benchmarks.bench_soak [--minutes 10] [--writers 16] [--readers 8] [--store local|s3]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.errors import NotCommitted, UnknownTeacher
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.targets.target_set import TargetSet
from potstill.cache.types import Tokens
from potstill.cache.upkeep.integrity import corrupt_shard_objects, corrupt_shared_objects
from tests.support.corpora import byte_tokenizer, teacher_for, topics, write_texts
from tests.support.fakes import FakeTeacher
from tests.support.processes.s3 import s3_server

CONTEXT = multiprocessing.get_context("forkserver")
COUNTS = ("reads", "positions", "too early", "wrong", "sets", "shards")
ENCODINGS = ("u8", "f16", "archive", "f32")
FIELDS = (
    Fields(k=16),
    Fields(k=16, draws=20, seed=7, entropy=True, temperatures=(2.0,)),
    Fields(k=0, draws=50, seed=1),
    Fields(k=40, entropy=True),
)
PLAN = FillPlan(batch_tokens=1000, claim_seconds=30)


def set_of(number: int) -> tuple[str, Fields, str]:
    """Name, fields and encoding of the target set that is filled at this turn."""
    return f"t{number:05d}", FIELDS[number // len(ENCODINGS) % len(FIELDS)], ENCODINGS[number % len(ENCODINGS)]


def write(url: str, environment: Mapping[str, str], until: float, counts: Any) -> None:
    os.environ.update(environment)
    cache = Cache.open(url, mode="r+")
    teacher = teacher_for(cache.corpus("docs"), tokens_per_second=20_000)
    while time.time() < until:
        name, fields, encoding = set_of(counts[COUNTS.index("sets")])
        targets = cache.plan_targets(name, "docs", teacher.identity, fields=fields, encoding=encoding)
        try:
            report = asyncio.run(asyncio.wait_for(fill(teacher, targets, PLAN), max(0.1, until - time.time())))
        except TimeoutError:
            return
        counts[COUNTS.index("sets")] += 1
        counts[COUNTS.index("shards")] += report.shards_committed


def read(url: str, environment: Mapping[str, str], until: float, counts: Any, seed: int) -> None:
    os.environ.update(environment)
    rng = random.Random(seed)
    while time.time() < until:
        # As a reader that comes and goes: what it remembers of commits begins anew.
        cache = Cache.open(url)
        names = cache.teachers("docs")
        teacher = teacher_for(cache.corpus("docs"))
        if not names:
            time.sleep(0.2)
        for _ in range(min(50, 20 * len(names))):
            # The newest are the ones that are being written.
            name = names[-1 - min(int(rng.expovariate(1)), len(names) - 1)]
            read_once(cache, name, teacher, rng, counts)
            if time.time() > until:
                return


def read_once(cache: Cache, name: str, teacher: FakeTeacher, rng: random.Random, counts: Any) -> None:
    corpus = cache.corpus("docs")
    rows = sorted(rng.sample(range(len(corpus)), 3)) if rng.random() < 0.5 else random_range(len(corpus), rng)
    try:
        targets = cache.targets(name, "docs")
        if rng.random() < 0.5:
            found = targets.read_rows(rows)
        else:
            start, stop = (int(corpus.row_starts[row]) for row in (rows[0], rows[0] + 1))
            rows, found = rows[:1], [targets.read(start, stop)]
    except (NotCommitted, UnknownTeacher):
        counts[COUNTS.index("too early")] += 1
        return
    for row, answer in zip(rows, found, strict=True):
        problem = "; ".join(differences(answer, teacher, corpus.row(row), targets))
        counts[COUNTS.index("reads")] += 1
        counts[COUNTS.index("positions")] += answer.num_positions
        if problem:
            counts[COUNTS.index("wrong")] += 1
            print(f"WRONG: {name} row {row}: {problem}", flush=True)


def random_range(end: int, rng: random.Random) -> list[int]:
    start = rng.randrange(end)
    return list(range(start, min(end, start + rng.randint(1, 8))))


def differences(found: Targets, teacher: FakeTeacher, row: Tokens, targets: TargetSet) -> Iterator[str]:
    """Name the fields of a read that differ from the teacher's by more than the encoding's bound."""
    fields = targets.fields
    exact = teacher.targets(row, fields)
    if (found.num_positions, found.k) != (exact.num_positions, exact.k):
        yield f"{found.num_positions} positions of k={found.k}"
    elif fields.k:
        yield from top_k_differences(found, exact, teacher.dense_logprobs(row), targets.encoding.max_abs_error)
    if (found.draws is None) != (exact.draws is None):
        yield "draws are missing"
    elif found.draws is not None:
        yield from (
            f"other draws ({name})"
            for name in ("offsets", "ids", "counts")
            if not np.array_equal(getattr(found.draws, name), getattr(exact.draws, name))
        )
    for name in ("entropy", "log_z"):
        mine, theirs = getattr(found, name), getattr(exact, name)
        if (mine is None) != (theirs is None):
            yield f"{name} is missing"
        elif mine is not None and np.abs(mine - theirs).max() > 0.01:
            yield f"{name} off by {np.abs(mine - theirs).max()}"


def top_k_differences(found: Targets, exact: Targets, dense: NDArray[np.float64], bound: float) -> Iterator[str]:
    # An encoding may order ids of equal stored logprobs as it likes.
    if not np.array_equal(np.sort(found.ids, axis=1), np.sort(exact.ids, axis=1)):
        yield "other ids"
        return
    off = np.abs(found.logprobs - np.take_along_axis(dense, found.ids.astype(np.int64), axis=1)).max()
    if off > bound + 1e-5:
        yield f"logprobs off by {off}"
    mass = np.exp(found.logprobs.astype(np.float64)).sum(axis=1) + np.exp(found.log_tail.astype(np.float64))
    if np.abs(mass - 1).max() > 1e-5:
        yield f"mass off by {np.abs(mass - 1).max()}"
    labels = np.abs(found.label_logprob[:-1] - exact.label_logprob[:-1]).max(initial=0.0)
    if labels > max(bound, 0.02) or not np.isnan(found.label_logprob[-1]):
        yield f"labels off by {labels}"


def make_corpus(url: str, folder: Path) -> None:
    cache = Cache.open(url, mode="r+")
    source = write_texts(folder / "text", topics(60, characters=1500))
    ingest(cache.root, "docs", [source], byte_tokenizer(), IngestPlan(row_tokens=100, shard_positions=1500))


def verify(url: str) -> list[str]:
    cache = Cache.open(url)
    found = []
    for name in cache.teachers("docs"):
        for each in cache.targets(name, "docs").sets:
            found += corrupt_shared_objects(each)
            for shard in np.flatnonzero(each.commits.committed).tolist():
                found += corrupt_shard_objects(each, shard)
    return found


def soak(url: str, environment: Mapping[str, str], args: argparse.Namespace) -> bool:
    until = time.time() + 60 * args.minutes
    counts = [CONTEXT.RawArray("q", len(COUNTS)) for _ in range(args.writers + args.readers)]
    processes = [
        CONTEXT.Process(target=write, args=(url, environment, until, counts[index]))
        if index < args.writers
        else CONTEXT.Process(target=read, args=(url, environment, until, counts[index], index))
        for index in range(args.writers + args.readers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    total = {name: sum(count[index] for count in counts) for index, name in enumerate(COUNTS)}
    failed = [process.exitcode for process in processes if process.exitcode]
    damaged = verify(url)
    print(
        f"{args.writers} writers and {args.readers} readers for {args.minutes:g} minutes: {total['shards']:,} shards "
        f"of {max(count[COUNTS.index('sets')] for count in counts)} complete target sets committed; {total['reads']:,} "
        f"rows of {total['positions']:,} positions read and recomputed, {total['wrong']} wrong; {total['too early']:,} "
        f"reads came too early; {len(failed)} processes failed, {len(damaged)} objects damaged"
    )
    for line in damaged[:20]:
        print(f"  {line}")
    return not (total["wrong"] or failed or damaged) and total["reads"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    args = parser.parse_args()
    CONTEXT.set_forkserver_preload(["zarr", "potstill.cache.fill.loop", "tests.support.corpora"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, environment = str(folder / "cache"), dict[str, str]()
        if args.store == "s3":
            server = stack.enter_context(s3_server())
            environment = server.environment()
            os.environ.update(environment)
            url = server.new_bucket()
        make_corpus(url, folder)
        return 0 if soak(url, environment, args) else 1


if __name__ == "__main__":
    sys.exit(main())
