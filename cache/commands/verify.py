"""`potstill verify`: read every byte of a cache and compare it with what was committed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cache.errors import CorruptSegment, FormatError, NotFound, PotstillError, SpecMismatch, UnknownCorpus
from cache.progress import Step, progress

if TYPE_CHECKING:
    from cache.cache import Cache
    from cache.targets import TargetSet

SUMMARY = "check every committed byte of a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("root", metavar="ROOT")
    parser.add_argument("--json", action="store_true", help='print {"ok", "shards_checked", "corrupt"}')


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when anything is not as committed."""
    from cache.cache import Cache

    with progress("verify", "groups") as show:
        checks = list(_checks(Cache.open(args.root)))
        corrupt: list[str] = []
        for done, (_, check) in enumerate(checks, start=1):
            corrupt.extend(check())
            show(Step(done, len(checks)))
    shards = sum(is_shard for is_shard, _ in checks)
    if args.json:
        print(json.dumps({"ok": not corrupt, "shards_checked": shards, "corrupt": corrupt}, indent=1))
    else:
        for line in corrupt:
            print(f"corrupt: {line}")
        if corrupt:
            print(
                "to score a damaged shard again: delete its record, targets/<teacher>/<corpus>/commits/<shard>.json, "
            )
            print("and run the same `potstill prefill`; `potstill gc` removes what is left of the damaged segment")
        print(f"{shards:,} shards and {len(checks) - shards:,} other groups checked, {len(corrupt):,} corrupt objects")
    return 1 if corrupt else 0


Check = Callable[[], list[str]]


def _checks(cache: Cache) -> Iterator[tuple[bool, Check]]:
    """(whether it is a shard, what to call) for everything that is published."""
    from cache.targets import target_set_paths

    for name in cache.root.folders("corpora"):
        try:
            corpus = cache.corpus(name)
        except UnknownCorpus:
            continue  # never sealed: garbage
        except (CorruptSegment, FormatError) as error:
            yield False, _known(error)
            continue
        yield False, corpus.corrupt_objects
    for path in target_set_paths(cache.root):
        yield from _target_checks(cache, path)
    yield from _journal_checks(cache)


def _target_checks(cache: Cache, path: str) -> Iterator[tuple[bool, Check]]:
    """A set with commits must open, whatever was lost of it or of its corpus."""
    _, teacher, corpus = path.split("/")
    if not cache.root.objects(f"{path}/commits"):
        return
    try:
        targets = cache.targets(teacher, corpus)
    except (CorruptSegment, FormatError, SpecMismatch, NotFound) as error:
        yield False, _known(error)
        return
    for shard in targets.committed.nonzero()[0]:
        yield True, _shard_check(targets, int(shard))


def _shard_check(targets: TargetSet, shard: int) -> Check:
    def check() -> list[str]:
        try:
            return targets.corrupt_objects(shard)
        except (CorruptSegment, FormatError) as error:
            return [error.detail]

    return check


def _journal_checks(cache: Cache) -> Iterator[tuple[bool, Check]]:
    from cache.journal import corrupt_journal_objects, journal_records

    for path in journal_records(cache.root):

        def check(path: str = path) -> list[str]:
            return corrupt_journal_objects(cache.root, path)

        yield False, check


def _known(error: PotstillError) -> Check:
    return lambda: [error.detail]
