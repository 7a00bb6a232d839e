"""`potstill contamination`: find items of benchmarks in the rows of a corpus, and keep these rows out of training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import AlreadyExists
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.corpus import Corpus
    from potstill.cache.text.contamination import Contamination

SUMMARY = "find items of benchmarks in a corpus, and flag the rows"
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cache", required=True, metavar="ROOT", help="folder or URL of the cache")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="whose rows")
    parser.add_argument(
        "--against",
        required=True,
        nargs="+",
        metavar="FILE",
        help="benchmarks, as JSON, JSON lines, CSV or Parquet, like those of TruthfulQA, ARC, MMLU and GSM8K",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="F",
        help="of the question, where the files have an unknown shape; further ones are of answers",
    )
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that are a match (default %(default)s)")
    parser.add_argument(
        "--name",
        default="contaminated",
        metavar="NAME",
        help="of the annotation; training leaves out those called contaminated or contaminated-… (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print all that was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Look, annotate the rows, and print what was found."""
    from potstill.cache.cache import Cache
    from potstill.cache.corpus import annotate
    from potstill.cache.corpus.annotations import require_name
    from potstill.cache.text.contamination import look_for, open_index

    corpus = Cache.open(args.cache).corpus(args.corpus)
    # Before the hours that looking may take.
    require_name(args.name)
    if args.name in corpus.annotations():
        raise AlreadyExists(
            f"corpus {corpus.name!r} has an annotation {args.name!r}, which stays as it is; give another name, such as "
            f"--name {args.name}-2, or remove it by potstill delete {args.cache} --corpus {corpus.name} --annotation "
            f"{args.name}"
        )
    files = [Path(file) for file in args.against]
    index = open_index(files, args.field, args.ngram)
    with progress("contamination", "rows") as show:
        found = look_for(
            corpus, files, index, lambda rows, hits: show(rows, len(corpus), f"{counted(hits, 'row')} with items")
        )
    annotate(Cache.open(args.cache, mode="r+").root, corpus.annotated, args.name, found.rows, found.provenance())
    if args.json:
        print(json.dumps({"corpus": corpus.name, "annotation": args.name, **found.to_json()}, indent=1))
    else:
        _print(corpus, args.name, found)
    return 0


def _print(corpus: Corpus, name: str, found: Contamination) -> None:
    from potstill.cache.corpus.annotations import CONTAMINATED, says_contaminated

    print_table(
        {
            "benchmark": lambda row: row.name,
            "items": lambda row: f"{row.items:,}",
            "not looked for": lambda row: f"{row.not_looked_for:,}",
            "found": lambda row: f"{row.found:,}",
            "with answer": lambda row: f"{row.with_answer:,}",
            "rows": lambda row: f"{row.rows:,}",
        },
        found.benchmarks,
    )
    for each in found.found[:_LISTED]:
        answer = " with its answer" if each.with_answer else ""
        found_as = f"{each.question!r}, by {each.matched!r}"
        print(f"row {each.row}: item {each.item} of {each.benchmark}{answer}: {found_as}")
    if len(found.found) > _LISTED:
        print(f"and {len(found.found) - _LISTED:,} more, which --json lists")
    left_out = (
        "which training leaves out"
        if says_contaminated(name)
        else f"which training does not leave out, as the name is not {CONTAMINATED}-…; name it in data.leave_out"
    )
    print(
        f"annotation {name} of corpus {corpus.name}: {int(found.rows.sum()):,} of {counted(len(corpus), 'row')} "
        f"with items of benchmarks, {left_out}"
    )
