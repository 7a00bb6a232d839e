"""`potstill card`: what was recorded of a corpus, as a page of Markdown."""

from __future__ import annotations

import argparse

SUMMARY = "write down what was recorded of a corpus, as Markdown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cache", required=True, metavar="ROOT", help="folder or URL of the cache")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="whose card")
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="those that `potstill filter` made and that were ingested; the counts of several are added up",
    )
    parser.add_argument("--out", metavar="FILE", help="where to write it (default: print it)")


def run(args: argparse.Namespace) -> int:
    """Write the card."""
    from pathlib import Path

    from potstill.cache.cache import Cache
    from potstill.cache.named_files import require_folder_of
    from potstill.cache.text.filter_report import read_report
    from potstill.cache.upkeep.card import data_card

    if args.out is not None:
        require_folder_of(args.out, "--out")
    filtered = {str(folder): read_report(folder) for folder in map(Path, args.filter)}
    card = data_card(Cache.open(args.cache), args.corpus, filtered)
    if args.out is None:
        print(card, end="")
    else:
        Path(args.out).write_text(card, encoding="utf-8")
        print(f"card of corpus {args.corpus} in {args.out}")
    return 0
