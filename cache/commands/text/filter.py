"""`potstill filter`: keep the documents that rules leave, and say what was dropped."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.commands.tables import print_table
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.text.filter_report import FilterCounts
    from potstill.cache.text.rules import FilterPlan

SUMMARY = "keep the documents that rules leave, and no copies"
_SAMPLE = 90  # characters of one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, or a folder of files, as for ingest")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for what is kept, to be ingested")
    parser.add_argument(
        "--rules",
        default="default",
        metavar="PRESET_OR_FILE",
        help="default (for text of all kinds), gopher or fineweb (for web pages), or a TOML file (default %(default)s)",
    )
    parser.add_argument(
        "--languages",
        type=lambda text: text.split(","),
        metavar="CODES",
        help="languages to keep, like en,de; un is none that is told, as of source code (default: all)",
    )
    parser.add_argument(
        "--duplicates",
        choices=["near", "exact", "keep"],
        help="copies to leave out: near and exact ones, exact ones, or none (default: near)",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="F", help="key or column of records with text (default %(default)s)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records without text, and text files that are not UTF-8, and count them",
    )
    parser.add_argument("--skip-unknown", action="store_true", help="leave out files of unknown kinds in folders")


def run(args: argparse.Namespace) -> int:
    """Filter, and print what was dropped by which rule."""
    from potstill.cache.text.rules import FilterPlan

    plan = FilterPlan.read(args.rules, args.languages, args.duplicates)
    try:
        counts = _filtered(args, plan)
    except KeyboardInterrupt:
        sys.stderr.write("stopped: nothing is kept, as copies are found only in one go; begin again\n")
        raise
    _print(counts, args.out)
    return 0


def _filtered(args: argparse.Namespace, plan: FilterPlan) -> FilterCounts:
    from pathlib import Path

    from potstill.cache.text.filtering import FilterProgress, filter_files

    with progress("filter", "characters") as show:

        def on_progress(at: FilterProgress) -> None:
            kept = f"{at.kept:,} of {counted(at.documents, 'document')} kept"
            show(at.characters, None, f"{at.files_done}/{counted(at.files, 'file')}, {kept}")

        return filter_files(
            args.sources,
            Path(args.out),
            plan,
            text_field=args.text_field,
            skip_bad=args.skip_bad,
            skip_unknown=args.skip_unknown,
            on_progress=on_progress,
        )


def _print(counts: FilterCounts, out: str) -> None:
    from potstill.cache.corpus.sources.files import FILTER_REPORT

    dropped = sorted(counts.dropped.items(), key=lambda item: -item[1].documents)
    if dropped:
        print_table(
            {
                "dropped by": lambda row: row[0],
                "documents": lambda row: f"{row[1].documents:,}",
                "by it alone": lambda row: f"{row[1].alone:,}",
                "characters": lambda row: f"{row[1].characters:,}",
            },
            dropped,
        )
    for name, found in dropped:
        sample = found.samples[0]
        value = "" if sample["value"] is None else f" ({_value(sample['value'])})"
        copied = f", like {sample['copy_of']['where']}" if "copy_of" in sample else ""
        print(f"{name}{value}: {sample['where']}{copied}: {' '.join(sample['text'].split())[:_SAMPLE]!r}")
    languages = sorted(counts.languages.items(), key=lambda item: -item[1].documents)
    told = ", ".join(f"{name} {amount.documents:,}" for name, amount in languages[:8])
    bad = counts.left_out["bad_records"]
    left_out = f"; {counted(bad, 'bad record')} left out (first: {counts.first_bad})" if bad else ""
    print(
        f"kept {counts.kept.documents:,} of {counted(counts.read.documents, 'document')} and "
        f"{counts.kept.characters:,} of {counts.read.characters:,} characters in {out}; languages: {told}; "
        f"more samples in {out}/{FILTER_REPORT}{left_out}"
    )


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
