"""The argument by which commands name a cache: `ROOT` or `--cache ROOT`, as the user likes."""

from __future__ import annotations

import argparse


def add_root_argument(
    parser: argparse.ArgumentParser,
    *also: str,
    required: bool = True,
    about: str = "folder or URL of the cache",
) -> None:
    """Declare `ROOT`, `--cache ROOT` and further names (`also`) of that option; its value is `args.cache`.

    Both at once, or neither where one is `required`, is wrong usage. A command with other positional arguments
    declares `--cache` alone.
    """
    names = parser.add_mutually_exclusive_group(required=required)
    # SUPPRESS: otherwise a positional argument that is left out would set the option's value back to None.
    names.add_argument("cache", nargs="?", metavar="ROOT", default=argparse.SUPPRESS, help=about)
    names.add_argument("--cache", *also, dest="cache", metavar="ROOT", help="another way to write ROOT")
