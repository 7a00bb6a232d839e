"""`potstill fill`: have a running service fill a corpus with one of its teachers, and watch it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from cache.commands.field_options import add_field_options, field_arguments, fields_of
from cache.errors import InvalidInput
from clients.commands.service_options import add_service_options, key_of

if TYPE_CHECKING:
    from clients.http_fill import HttpFill

SUMMARY = "have a running service fill a corpus with a teacher's targets"
_SILENCE_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_service_options(parser)
    parser.add_argument("--corpus", required=True, metavar="NAME")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="the teacher's name on the service")
    add_field_options(parser)
    parser.add_argument("--stop", action="store_true", help="stop the job instead of starting one")
    parser.add_argument("--no-watch", action="store_true", help="start the job, and do not wait for its end")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="watch on for so long while the service does not answer (default: %(default)g seconds)",
    )
    parser.add_argument("--json", action="store_true", help="print the job's last state as JSON")


def run(args: argparse.Namespace) -> int:
    """Start or stop a job and watch it; Ctrl-C ends the watching, not the job. Returns the exit status.

    Raises:
        Unavailable: the service did not answer for `--patience` seconds.
        NotFound: there is no job to stop, or the service was restarted. PotstillError: what it refuses.
    """
    from clients.http_fill import HttpFill
    from clients.http_reads import Reads
    from clients.retry import RetryPolicy

    if not 0 < args.patience < math.inf:
        raise InvalidInput(f"--patience is {args.patience:g}; it must be a positive number of seconds")
    api_key = key_of(args)
    with Reads(args.url, api_key=api_key, retry=RetryPolicy(attempts=5)) as reads:
        job = HttpFill(reads, args.corpus, args.teacher)
        at = job.stop() if args.stop else job.start(fields_of(args), args.encoding)
    if args.stop or args.no_watch:
        tells = _summary if args.stop else _begun
        print(json.dumps(at, indent=2) if args.json else tells(at, args))
        return _exit_status(at)
    silence = min(_SILENCE_SECONDS, args.patience)
    with Reads(args.url, api_key=api_key, timeout=silence, retry=RetryPolicy(attempts=1)) as reads:
        at = _watched(HttpFill(reads, args.corpus, args.teacher), at, args)
    print(json.dumps(at, indent=2) if args.json else _summary(at, args))
    return _exit_status(at)


def _watched(job: HttpFill, at: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from cache.progress import Step, progress
    from clients.fill_watch import FillWatch

    title = f"fill {args.corpus} by {args.teacher}"
    watch = FillWatch(
        job,
        patience=args.patience,
        again=_command(args),
        tell=lambda line: print(f"{title}: {line}", file=sys.stderr, flush=True),
    )
    pause = 0.2
    try:
        with progress(title, "tokens") as show:
            while at["state"] in ("waiting", "running"):
                time.sleep(pause)
                pause = min(2.0, pause * 1.5)
                at = watch.look()
                waiting = f", waiting for {at['waiting_for']} shards of other jobs" if at["waiting_for"] else ""
                if at["state"] == "waiting":
                    waiting = ", waiting for its turn among the service's jobs"
                shards = f"{at['shards_committed']}/{at['shards'] - at['shards_before']} shards"
                show(Step(at["positions_scored"], at["positions"] or None, shards + waiting))
    except KeyboardInterrupt:
        print(f"the job goes on in the service; `{_command(args, stop=True)}` ends it", file=sys.stderr)
        raise
    return at


def _command(args: argparse.Namespace, *, stop: bool = False) -> str:
    """The command line that watches the job, and starts it when it does not run; or the one that stops it."""
    words = ["potstill", "fill", "--url", args.url, "--corpus", args.corpus, "--teacher", args.teacher]
    if args.api_key_env is not None:
        words += ["--api-key-env", args.api_key_env]
    return shlex.join([*words, "--stop"] if stop else [*words, *field_arguments(args)])


def _begun(at: dict[str, Any], args: argparse.Namespace) -> str:
    """Of a job that runs: all that is known this early for certain, and what to type next."""
    return (
        f"{at['teacher']} on {at['corpus']}: {at['state']} in the service; {at['shards_before']} of {at['shards']} "
        f"shards were committed before it\nwatch it: {_command(args)}\nstop it: {_command(args, stop=True)}"
    )


def _summary(at: dict[str, Any], args: argparse.Namespace) -> str:
    done = at["shards_before"] + at["shards_committed"]
    line = (
        f"{at['teacher']} on {at['corpus']}: {at['state']}, {done} of {at['shards']} shards committed "
        f"({at['shards_before']} before); scored {at['positions_scored']:,} positions in {at['seconds']:.1f} s, "
        f"{at['positions_per_second']:,.0f} tokens/s"
    )
    if at["error"]:
        line += f"; {at['error']['kind']}: {at['error']['detail']}"
    if at["state"] not in ("stopped", "failed"):
        return line
    again = "`potstill fill` with its options" if args.stop else "the same command"
    return f"{line}; {again} goes on with the rest"


def _exit_status(at: dict[str, Any]) -> int:
    return 1 if at["state"] == "failed" else 0
