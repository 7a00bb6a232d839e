"""A prefill in a process of its own, for tests that share work with it, stop it and kill it.

Its arguments are ROOT [--tokens-per-second N] [--claim-seconds S] [--fields JSON] [--told]. It prints a line of JSON at
every step, and one with the report and the rows that were scored at the end. With `--told` it prints one first when it
could begin, and does so after a line of input.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill.cache import Cache, Fields
from potstill.cache.fill.loop import FillPlan, FillProgress, fill
from potstill.cache.targets.commit import segment_path
from potstill.cache.types import Tokens
from potstill.cache.upkeep.garbage import find_garbage
from potstill.cache.upkeep.integrity import corrupt_shard_objects, corrupt_shared_objects
from tests.support.corpora import teacher_for
from tests.support.processes.forked import Forked

BATCH_TOKENS = 200


def show(at: FillProgress) -> None:
    print(json.dumps(asdict(at)), flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--tokens-per-second", type=float, default=0.0)
    parser.add_argument("--claim-seconds", type=float, default=120.0)
    parser.add_argument("--fields", default='{"k": 16}')
    parser.add_argument("--told", action="store_true")
    args = parser.parse_args(arguments)
    cache = Cache.open(args.root, mode="r+")
    teacher = teacher_for(cache.corpus("docs"), tokens_per_second=args.tokens_per_second)
    fields = Fields.from_json(json.loads(args.fields))
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=fields)
    plan = FillPlan(batch_tokens=BATCH_TOKENS, claim_seconds=args.claim_seconds)
    if args.told:
        print("{}", flush=True)
        sys.stdin.readline()
    report = asyncio.run(fill(teacher, targets, plan, on_progress=show))
    rows = [row_name(row) for row in teacher.scored]
    print(json.dumps({**asdict(report), "rows": rows}), flush=True)


def row_name(row: Tokens | bytes) -> str:
    """The name of a row in a job's report: rows of equal tokens have the same."""
    return hashlib.sha256(row if isinstance(row, bytes) else row.tobytes()).hexdigest()[:16]


@contextmanager
def fill_job(root: str | Path, *options: object) -> Iterator[Forked]:
    """A running job; killed at the end if it still runs."""
    with Forked(main, [str(root), *map(str, options)]) as job:
        yield job


def begin_together(*jobs: Forked) -> None:
    """Let jobs that were started with `--told` begin once all of them can."""
    for job in jobs:
        step_of(job)
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()


def step_of(process: Forked) -> dict[str, Any]:
    """The next line it prints."""
    line = process.stdout.readline()
    assert line, "the job ended"
    return dict(json.loads(line))


def report_of(process: Forked) -> dict[str, Any]:
    """The last line it prints, after it ended well."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return dict(json.loads(out.splitlines()[-1]))


def segment_bytes(cache: Cache) -> dict[tuple[str, int, str], bytes]:
    """Every committed object's bytes, by segment set, shard and path within its segment."""
    found = {}
    for each in cache.targets("fake", "docs").sets:
        for commit in each.commits.all():
            for item in commit.objects:
                data = cache.root.get(f"{segment_path(each.path, commit.segment)}/{item.path}")
                assert data is not None
                found[each.path, commit.shard, item.path] = data
    return found


def assert_whole(cache: Cache) -> None:
    """Every shard is committed, everything verifies, and nothing else is left."""
    targets = cache.targets("fake", "docs")
    assert targets.committed.all()
    for each in targets.sets:
        assert corrupt_shared_objects(each) == []
        assert all(corrupt_shard_objects(each, shard) == [] for shard in range(targets.corpus.num_shards))
        assert cache.root.objects(f"{each.path}/claims") == []
    assert find_garbage(cache.root, min_age_seconds=0) == []
