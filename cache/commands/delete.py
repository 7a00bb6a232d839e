"""`potstill delete`: remove targets, a corpus, an annotation or a journal from a cache."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.store import Root
    from potstill.cache.upkeep.delete import Removal

SUMMARY = "remove targets, shards, a corpus, annotation or journal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--teacher", metavar="NAME", help="whose targets; with --corpus only those for it")
    parser.add_argument("--corpus", metavar="NAME", help="without --teacher: the corpus with all targets of it")
    parser.add_argument("--annotation", metavar="NAME", help="one of --corpus, which itself stays")
    parser.add_argument(
        "--set", metavar="NAME", help="one segment set: `first`, or one whose fields were added later (see inspect)"
    )
    parser.add_argument("--shard", type=int, nargs="+", metavar="N", help="single shards, to be scored again")
    parser.add_argument("--journal", action="store_true", help="what a service kept of the teacher, not its targets")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--force", action="store_true", help="also while a job seems to be filling it")


def run(args: argparse.Namespace) -> int:
    """Print what will be removed, ask, and remove it; exit status 1 when the answer is no."""
    from potstill.cache.store import Root
    from potstill.cache.upkeep.delete import remove

    root = Root.open(args.cache)
    removals = _plan_idle(root, args)
    for removal in removals:
        print(f"{removal.title}; {counted(removal.num_objects, 'object')}, {counted(removal.num_bytes, 'byte')}")
    if not args.yes:
        if not _agreed():
            print("nothing was removed")
            return 1
        # A job may have begun or ended while the question was read.
        removals = _plan_idle(root, args)
    for removal in removals:
        remove(root, removal)
    stored = sum(removal.num_bytes for removal in removals)
    print(f"removed {counted(sum(removal.num_objects for removal in removals), 'object')}, {counted(stored, 'byte')}")
    return 0


def _plan_idle(root: Root, args: argparse.Namespace) -> list[Removal]:
    from potstill.cache.upkeep.delete import jobs_at_work

    removals = _plan(root, args)
    busy = jobs_at_work(root, removals)
    if busy and not args.force:
        raise InvalidInput(
            f"a job seems to be filling {', '.join(busy)}; stop it and wait until its claims expire (two minutes, or "
            "its --claim-seconds), or add --force"
        )
    return removals


def _plan(root: Root, args: argparse.Namespace) -> list[Removal]:
    from potstill.cache.upkeep.delete import (
        plan_annotation,
        plan_corpus,
        plan_journal,
        plan_set,
        plan_shards,
        plan_teacher,
    )

    _check_combination(args)
    if args.annotation is not None:
        return plan_annotation(root, args.corpus, args.annotation)
    if args.journal:
        return plan_journal(root, args.teacher)
    if args.teacher is None:
        return plan_corpus(root, args.corpus)
    if args.shard:
        return plan_shards(root, args.teacher, args.corpus, args.set, args.shard)
    if args.set is not None:
        return plan_set(root, args.teacher, args.corpus, args.set)
    return plan_teacher(root, args.teacher, args.corpus)


def _check_combination(args: argparse.Namespace) -> None:
    if args.teacher is None and (args.corpus is None or args.journal):
        raise InvalidInput("--teacher or --corpus has to say what to remove; --journal needs --teacher")
    parts = args.set is not None or bool(args.shard)
    if parts and (args.teacher is None or args.corpus is None):
        raise InvalidInput("--set and --shard need both --teacher and --corpus")
    if args.annotation is not None and (args.corpus is None or args.teacher is not None):
        raise InvalidInput("--annotation goes with --corpus alone, whose it is")
    if args.journal and (parts or args.corpus is not None):
        raise InvalidInput("--journal goes with --teacher alone: a journal belongs to no corpus")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise InvalidInput("nothing was removed: there is no terminal to ask on; add --yes")
    try:
        return input("remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
