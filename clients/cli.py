"""The `potstill` command. Its subcommands are modules found by the entry points `potstill.commands`.

Only the chosen module is loaded, so that a command does not wait for the imports of another.

Exit status: 0 done, 1 a `PotstillError` (one line `kind: detail` on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from typing import cast

from potstill.cache.entry_points import Command, command_entry_points
from potstill.cache.errors import PotstillError
from potstill.cache.extras import missing_module
from potstill.cache.printable import printable

_INTERRUPTED = 128 + 2  # as shells report SIGINT

_WORDS = """words:
  row, position  a token sequence that a teacher reads at once; one token of it
  corpus         a sealed set of rows, made of your text by `potstill ingest`
  targets        what a teacher expects after each position: its k likeliest
                 next tokens, and the tail: the probability of all others
  capture        taking the targets out of the engine that runs the teacher
  shard          a range of rows that is scored and committed as a whole; its
                 stored targets are a segment, those of all shards a segment set
  journal        targets of rows that a service was asked for and no corpus has"""


class _Help(argparse.HelpFormatter):
    """Argparse's own, with `--in-flight N` for a number and not `--in-flight IN_FLIGHT`."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type in (int, float) else super()._get_default_metavar_for_optional(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; wrong usage raises SystemExit(2)."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe may lack a letter that a path or a row has; a `?` is better than a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except PotstillError as error:
        print(f"{error.kind}: {printable(error.detail)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        # Heavy packages are imported when a command runs, and belong to extras that may not be installed. A module of
        # our own is in every installation: where one is missing, the traceback says more than an extra to install.
        if (error.name or "").partition(".")[0] == "potstill":
            raise
        print(f"potstill: {missing_module(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough. Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A file or folder that may not be read, a name that is too long, no place for temporary files.
        print(f"potstill: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    return status


def _dispatch(argv: list[str]) -> int:
    commands = command_entry_points()
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        try:
            print(f"potstill {version('potstill')}")
        except PackageNotFoundError:
            print("potstill (not installed)")
        return 0
    if argv[0] not in commands:
        what = "option" if argv[0].startswith("-") else "command"
        known = ", ".join(sorted(commands))
        print(f"potstill: unknown {what} {argv[0]!r}; commands are {known}", file=sys.stderr)
        return 2
    command = _load(commands[argv[0]])
    parser = argparse.ArgumentParser(
        prog=f"potstill {argv[0]}",
        description=command.SUMMARY,
        formatter_class=_Help,
        epilog="`potstill --help` says what a row, a shard or a segment is.",
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[1:]))


def _overview(commands: Mapping[str, EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [f"  {name:{width}}  {_summary(commands[name])}" for name in sorted(commands)]
    usage = "usage: potstill [--version] [--help] COMMAND ...\n\ncommands:"
    return "\n".join([usage, *lines, f"\n{_WORDS}", "\n`potstill COMMAND --help` tells more about one."])


def _summary(point: EntryPoint) -> str:
    try:
        return _load(point).SUMMARY
    except ModuleNotFoundError as error:
        return f"({missing_module(error)})"


def _load(point: EntryPoint) -> Command:
    return cast(Command, point.load())


if __name__ == "__main__":
    sys.exit(main())
