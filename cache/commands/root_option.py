"""The argument by which commands name a cache: `ROOT`, or `--cache ROOT`, whichever comes to mind."""

from __future__ import annotations

import argparse


def add_root_argument(
    parser: argparse.ArgumentParser,
    *also: str,
    required: bool = True,
    about: str = "folder or URL of the cache",
) -> None:
    """Declare `ROOT`, `--cache ROOT` and further names of that option; read it as `args.cache`.

    Both at once, or neither where one is `required`, is wrong usage. A command whose positional arguments are
    something else declares `--cache` alone.
    """
    names = parser.add_mutually_exclusive_group(required=required)
    # Without SUPPRESS a positional argument that is left out would set what the option has set back to None.
    names.add_argument("cache", nargs="?", metavar="ROOT", default=argparse.SUPPRESS, help=about)
    names.add_argument("--cache", *also, dest="cache", metavar="ROOT", help="another way to write ROOT")
