"""`potstill gc`: show and remove what stopped writers left behind."""

from __future__ import annotations

import argparse

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.errors import FormatError, InvalidInput
from potstill.cache.plurals import counted

SUMMARY = "remove what stopped writers left in a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="only show")
    parser.add_argument(
        "--min-age-hours",
        type=float,
        default=24.0,
        help="leave what was written to within this time: a writer may still be at it (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print each group that no record names, and remove it unless --dry-run.

    Raises:
        FormatError: in the end, when something was left alone because a record cannot be read.
    """
    from potstill.cache.store import Root
    from potstill.cache.upkeep import find_garbage
    from potstill.cache.upkeep.garbage import remove_garbage

    if not args.min_age_hours >= 0:
        raise InvalidInput(f"--min-age-hours is {args.min_age_hours}; it must be at least 0")
    root = Root.open(args.cache)
    skipped: list[str] = []
    found = find_garbage(root, min_age_seconds=0.0, on_skip=skipped.append)
    garbage = [item for item in found if item.age_seconds >= args.min_age_hours * 3600]
    removed = []
    for item in garbage:
        print(f"{item.path}  {counted(item.size, 'byte')}")
        if args.dry_run or remove_garbage(root, item):
            removed.append(item)
    younger = len(found) - len(garbage)
    if younger:
        print(f"{younger:,} more groups are younger than {args.min_age_hours:g} h (--min-age-hours)")
    verb = "would be removed" if args.dry_run else "removed"
    print(f"{counted(len(removed), 'group')} of {sum(item.size for item in removed):,} bytes {verb}")
    if skipped:
        more = f"; so were {len(skipped) - 1:,} more places" if len(skipped) > 1 else ""
        raise FormatError(f"{skipped[0]}; what it may name was left alone{more}")
    return 0
