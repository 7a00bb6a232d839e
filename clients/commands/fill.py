"""`potstill fill`: have a running service fill a corpus with one of its teachers, and watch it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from cache.commands.field_options import add_field_options, fields_of

if TYPE_CHECKING:
    from clients.http_fill import HttpFill

SUMMARY = "have a running service fill a corpus with a teacher's targets"
_DEFAULT_URL = "http://127.0.0.1:8700"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--url", default=_DEFAULT_URL, help="the service (default: %(default)s)")
    parser.add_argument("--corpus", required=True, metavar="NAME")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="the teacher's name on the service")
    add_field_options(parser)
    parser.add_argument("--stop", action="store_true", help="stop the job instead of starting one")
    parser.add_argument("--no-watch", action="store_true", help="start the job, and do not wait for its end")
    parser.add_argument("--json", action="store_true", help="print the job's last state as JSON")


def run(args: argparse.Namespace) -> int:
    """Start or stop a job and watch it; Ctrl-C ends the watching, not the job. Returns the exit status."""
    from clients.http_fill import HttpFill
    from clients.http_reads import Reads
    from clients.retry import RetryPolicy

    with Reads(args.url, retry=RetryPolicy(attempts=5)) as reads:
        job = HttpFill(reads, args.corpus, args.teacher)
        if args.stop:
            at = job.stop()
        else:
            at = job.start(fields_of(args), args.encoding)
            if not args.no_watch:
                at = _watched(job, at, args)
    print(json.dumps(at, indent=2) if args.json else _summary(at))
    return _exit_status(at)


def _watched(job: HttpFill, at: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from cache.progress import Step, progress

    pause = 0.2
    try:
        with progress(f"fill {args.corpus} by {args.teacher}", "tokens") as show:
            while at["state"] == "running":
                time.sleep(pause)
                pause = min(2.0, pause * 1.5)
                at = job.status()
                waiting = f", waiting for {at['waiting_for']} shards of other jobs" if at["waiting_for"] else ""
                shards = f"{at['shards_committed']}/{at['shards'] - at['shards_before']} shards"
                show(Step(at["positions_scored"], at["positions"] or None, shards + waiting))
    except KeyboardInterrupt:
        print("the job goes on in the service; `potstill fill --stop` with the same names ends it", file=sys.stderr)
        raise
    return at


def _summary(at: dict[str, Any]) -> str:
    done = at["shards_before"] + at["shards_committed"]
    line = (
        f"{at['teacher']} on {at['corpus']}: {at['state']}, {done} of {at['shards']} shards committed "
        f"({at['shards_before']} before); scored {at['positions_scored']:,} positions in {at['seconds']:.1f} s, "
        f"{at['positions_per_second']:,.0f} tokens/s"
    )
    if at["error"]:
        line += f"; {at['error']['kind']}: {at['error']['detail']}"
    return line + ("; the same command goes on with the rest" if at["state"] in ("stopped", "failed") else "")


def _exit_status(at: dict[str, Any]) -> int:
    return 1 if at["state"] == "failed" else 0
