"""`potstill compact`: make a corpus with targets of the rows that a service has in its journal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.journal.compact import CompactReport

SUMMARY = "make a corpus of what a service's journal keeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--teacher", required=True, metavar="NAME", help="whose journal")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="the corpus to make")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_NAME",
        help="the teacher's own; default: that of a corpus in the cache which has it",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="entries a position; rows with fewer stay in the journal (default: what the journal has)",
    )
    parser.add_argument("--shard-positions", type=int, metavar="N", help="of the corpus (default: as of `ingest`)")
    parser.add_argument("--keep-journal", action="store_true", help="remove nothing from the journal")


def run(args: argparse.Namespace) -> int:
    """Compact, and print a summary. When it was stopped, the same command goes on."""
    from potstill.cache.cache import Cache
    from potstill.cache.corpus.tokenizer import load_tokenizer
    from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
    from potstill.cache.journal.compact import CompactPlan, compact

    plan = CompactPlan(
        teacher=args.teacher,
        corpus=args.corpus,
        k=args.top_k,
        tokenizer=None if args.tokenizer is None else load_tokenizer(args.tokenizer),
        tokenizer_files={} if args.tokenizer is None else load_tokenizer_files(args.tokenizer),
        keep_journal=args.keep_journal,
        shard_positions=args.shard_positions,
    )
    # Opened to read first: a mistyped folder must not be made.
    Cache.open(args.cache)
    cache = Cache.open(args.cache, mode="r+")
    with progress("compact", "positions") as show:
        report = compact(cache, plan, on_progress=show)
    print(_summary(plan.teacher, report))
    return 0


def _summary(teacher: str, report: CompactReport) -> str:
    corpus = report.corpus
    made = "made" if report.corpus_made else "was there"
    return (
        f"{teacher}: corpus {corpus.name} {made}, {counted(len(corpus), 'row')}, "
        f"{counted(corpus.num_positions, 'position')}; "
        f"top-{report.k} as {report.encoding}, {counted(report.shards_written, 'shard')} committed, "
        f"{report.shards_before} before; "
        f"{counted(report.segments_removed, 'journal segment')} of {report.bytes_removed:,} bytes removed, "
        f"{report.segments_left} left"
    )
