"""`potstill gc`: show and remove what stopped writers left behind."""

from __future__ import annotations

import argparse

from cache.errors import InvalidInput

SUMMARY = "remove what stopped writers left in a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("root", metavar="ROOT")
    parser.add_argument("--dry-run", action="store_true", help="only show")
    parser.add_argument(
        "--min-age-hours",
        type=float,
        default=24.0,
        help="leave what was written to within this time: a writer may still be at it (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Show each group that no record names, and remove it unless --dry-run."""
    from cache.garbage import find_garbage, remove_garbage
    from cache.store import Root

    if not args.min_age_hours >= 0:
        raise InvalidInput(f"--min-age-hours is {args.min_age_hours}; it must be at least 0")
    root = Root.open(args.root)
    garbage = find_garbage(root, min_age_seconds=args.min_age_hours * 3600)
    for item in garbage:
        print(f"{item.path}  {item.size:,} bytes")
        if not args.dry_run:
            remove_garbage(root, item)
    younger = len(find_garbage(root, min_age_seconds=0.0)) - (len(garbage) if args.dry_run else 0)
    if younger:
        print(f"{younger:,} more groups are younger than {args.min_age_hours:g} h (--min-age-hours)")
    verb = "would be removed" if args.dry_run else "removed"
    print(f"{len(garbage):,} groups of {sum(item.size for item in garbage):,} bytes {verb}")
    return 0
