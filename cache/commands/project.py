"""`potstill project`: make a teacher's targets of one tokenizer into targets of another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import PotstillError
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.projection import ProjectionReport

SUMMARY = "project a teacher's targets to a student's tokenizer"

_LITTLE = 0.01
_Row = tuple[str, dict[str, float]]
_HEADINGS = {"aligned": "aligned", "one_to_one": "one to one", "agreeing": "agreeing", "resolved": "resolved"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cache", required=True, metavar="ROOT", help="folder or URL of the cache")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="ingested with the student's tokenizer")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="whose targets to project")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="CORPUS", help="the same documents, with its own tokenizer"
    )
    parser.add_argument("--encoding", help="u8, archive, f16 or f32 (default: as the teacher's targets are kept)")
    parser.add_argument("--json", action="store_true", help="print what aligned as JSON")


def run(args: argparse.Namespace) -> int:
    """Project the shards that are not committed yet, and print what aligned; where all are, what did in these."""
    from potstill.cache.cache import Cache
    from potstill.cache.encoding.logprobs import encoding_by_name
    from potstill.cache.projection import ProjectionPlan, project

    if args.encoding is not None:
        encoding_by_name(args.encoding)
    plan = ProjectionPlan(corpus=args.corpus, teacher=args.teacher, source=args.source, encoding=args.encoding)
    # A folder that is not there is refused, not made.
    Cache.open(args.cache)
    try:
        with progress(f"project {args.teacher}", "positions") as show:
            report = project(Cache.open(args.cache, mode="r+"), plan, on_progress=show)
    except KeyboardInterrupt:
        print(f"{args.teacher}: stopped; {_kept(args)}, the same command goes on with the rest", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        _print(args, report)
    if report.tally.num_positions and report.tally.resolved < _LITTLE:
        print(
            f"warning: nearly nothing aligned: {report.tally.resolved:.2%} of the mass of {args.teacher} is resolved, "
            "so these targets teach next to nothing",
            file=sys.stderr,
        )
    return 0


def _kept(args: argparse.Namespace) -> str:
    from potstill.cache.cache import Cache

    try:
        committed = Cache.open(args.cache).targets(args.teacher, args.corpus).committed
    except PotstillError:
        return "no shard committed"  # or the store is what does not answer, which the next run will say
    return f"{int(committed.sum()):,} of {counted(len(committed), 'shard')} of corpus {args.corpus} committed so far"


def _as_json(report: ProjectionReport) -> dict[str, object]:
    shards = {name: getattr(report, f"shards_{name}") for name in ("written", "before", "waiting")}
    return {"shards": shards, "by_category": report.tally.to_json()}


def _print(args: argparse.Namespace, report: ProjectionReport) -> None:
    if report.tally.num_positions:
        columns: dict[str, Callable[[_Row], object]] = {"next token": lambda row: row[0], "positions": _positions}
        columns |= {told: partial(_share, name) for name, told in _HEADINGS.items()}
        print_table(columns, report.tally.to_json().items())
    if report.shards_written and report.shards_before and not report.shards_waiting:
        print("the table is of the shards that were committed now; the same command again prints that of all")
    waiting = f", {report.shards_waiting} wait for targets of corpus {args.source}" if report.shards_waiting else ""
    print(
        f"{args.teacher}: {counted(report.shards_written, 'shard')} of corpus {args.corpus} committed, "
        f"{report.shards_before} before{waiting}"
    )


def _positions(row: _Row) -> str:
    return f"{int(row[1]['positions']):,}"


def _share(name: str, row: _Row) -> str:
    return f"{row[1][name]:.1%}"
