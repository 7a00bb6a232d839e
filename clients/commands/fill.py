"""`potstill fill`: have a running service fill a corpus with one of its teachers, and watch it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from potstill.cache.commands.field_options import add_field_options, field_arguments, fields_of
from potstill.cache.errors import InvalidInput
from potstill.cache.logins import without_login
from potstill.cache.plurals import counted
from potstill.cache.printable import printable
from potstill.clients.commands.service_options import add_service_options, key_of

if TYPE_CHECKING:
    from potstill.clients.fill_watch import FillWatch

SUMMARY = "have a running service fill a corpus with a teacher's targets"
_SILENCE_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_service_options(parser)
    parser.add_argument("--corpus", required=True, metavar="NAME", help="a corpus of the service's cache")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="the teacher's name on the service")
    add_field_options(parser)
    parser.add_argument("--stop", action="store_true", help="stop the job instead of starting one")
    parser.add_argument("--no-watch", action="store_true", help="start the job, and do not wait for its end")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="try on for so long while the service does not answer (default: %(default)g seconds)",
    )
    parser.add_argument("--json", action="store_true", help="print the job's last state as JSON")


def run(args: argparse.Namespace) -> int:
    """Start or stop a job and watch it; Ctrl-C ends the watching, not the job. Returns the exit status.

    Raises:
        Unavailable: the service did not answer for `--patience` seconds.
        NotFound: there is no job to stop, or the service was restarted. PotstillError: what it refuses.
    """
    from potstill.clients.fill_watch import FillWatch
    from potstill.clients.patience import Patience
    from potstill.clients.retry import RetryPolicy
    from potstill.clients.sync_connection import SyncConnection

    if not 0 < args.patience < math.inf:
        raise InvalidInput(f"--patience is {args.patience:g}; it must be a positive number of seconds")
    silence = min(_SILENCE_SECONDS, args.patience)
    once = RetryPolicy(attempts=1)  # the watch itself tries again, and tells the person who waits
    with SyncConnection(args.url, api_key=key_of(args), timeout=silence, retry=once) as connection:
        patience = Patience(args.patience, lambda line: print(f"{_title(args)}: {line}", file=sys.stderr, flush=True))
        watch = FillWatch(connection, args.corpus, args.teacher, patience, again=_command(args))
        at = watch.stop() if args.stop else watch.start(fields_of(args), args.encoding)
        watches = not (args.stop or args.no_watch)
        if watches:
            at = _watched(watch, at, args)
    tells = _summary if args.stop or watches else _begun
    print(json.dumps(at, indent=2) if args.json else printable(tells(at, args)))
    return 1 if at["state"] == "failed" else 0


def _title(args: argparse.Namespace) -> str:
    return f"fill {args.corpus} by {args.teacher}"


def _watched(watch: FillWatch, at: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from potstill.cache.commands.progress import progress

    pause = 0.2  # at first short, as a small corpus is filled in a moment
    try:
        with progress(_title(args), "tokens") as show:
            while at["state"] in ("waiting", "running"):
                time.sleep(pause)
                pause = min(2.0, pause * 1.5)
                at = watch.look()
                shards = f"{at['shards_committed']}/{counted(at['shards'] - at['shards_before'], 'shard')}"
                show(at["positions_scored"], at["positions"] or None, shards + _waiting(at))
    except KeyboardInterrupt:
        print(f"the job goes on in the service; `{_command(args, stop=True)}` ends it", file=sys.stderr)
        raise
    return at


def _waiting(at: dict[str, Any]) -> str:
    told = at.get("told_to_wait")  # which an older service does not say
    if told:
        return printable(f", told to come back later ({told['kind']}: {told['detail']})")
    if at["state"] == "waiting":
        return ", waiting for its turn among the service's jobs"
    return f", waiting for {counted(at['waiting_for'], 'shard')} of other jobs" if at["waiting_for"] else ""


def _command(args: argparse.Namespace, *, stop: bool = False) -> str:
    """The command line that watches the job, or starts it when it does not run; with `stop`, the one that stops it.

    A key in the URL is left out, because printed commands are copied and kept.
    """
    words = ["potstill", "fill", "--url", without_login(args.url), "--corpus", args.corpus, "--teacher", args.teacher]
    if args.api_key_env is not None:
        words += ["--api-key-env", args.api_key_env]
    return shlex.join([*words, "--stop"] if stop else [*words, *field_arguments(args)])


def _begun(at: dict[str, Any], args: argparse.Namespace) -> str:
    """Tell all that is certain this early about a job, and what to type next."""
    from potstill.clients.address import login_of

    left_out = "" if login_of(args.url) is None else "\n(without the key of the URL: put it into POTSTILL_API_KEY)"
    return (
        f"{at['teacher']} on {at['corpus']}: {at['state']} in the service; {at['shards_before']:,} of "
        f"{counted(at['shards'], 'shard')} committed before it\n"
        f"watch it: {_command(args)}\nstop it: {_command(args, stop=True)}{left_out}"
    )


def _summary(at: dict[str, Any], args: argparse.Namespace) -> str:
    done = at["shards_before"] + at["shards_committed"]
    line = (
        f"{at['teacher']} on {at['corpus']}: {at['state']}, {done:,} of {counted(at['shards'], 'shard')} committed "
        f"({at['shards_before']} before); scored {counted(at['positions_scored'], 'position')} in "
        f"{at['seconds']:.1f} s, {at['positions_per_second']:,.0f} tokens/s"
    )
    if at["error"]:
        line += f"; {at['error']['kind']}: {at['error']['detail']}"
    if at["state"] not in ("stopped", "failed"):
        return line
    again = "`potstill fill` with its options" if args.stop else "the same command"
    return f"{line}; {again} goes on with the rest"
