"""`potstill doctor`: look for what would spoil hours of work, before it does."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.teacher_options import add_teacher_options, teacher_options
from potstill.cache.entry_points import name_and_model
from potstill.clients.commands.service_options import DEFAULT_URL, add_key_option, key_of

if TYPE_CHECKING:
    from potstill.clients.doctor.findings import Finding

SUMMARY = "check a service, its teachers and a cache before hours of work"
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "not run": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--url", help=f"a running service and all its teachers (default: {DEFAULT_URL} when nothing else is named)"
    )
    add_key_option(parser)
    add_root_argument(parser, required=False, about="a cache, looked at by this process")
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="open MODEL (a model, its path, or http://host:port#NAME) and look at it; may be repeated. Beside --url, "
        "the key of --api-key-env is shown to URLs of its scheme, host and port only",
    )
    add_teacher_options(parser)
    parser.add_argument("--json", action="store_true", help='print {"ok", "findings"}')
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        help="nats that two scores of a row may differ by (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=8, help="scores of one row, at least four a replica (default: %(default)s)"
    )
    parser.add_argument(
        "--max-probe-tokens", type=int, default=4096, help="do not try longer rows than that (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Make all checks and print the findings; returns 1 when any check fails, else 0."""
    from potstill.clients.doctor.examine import Patient, examine
    from potstill.clients.doctor.teacher_checks import Probing

    teachers = [name_and_model(text) for text in args.teacher]
    nothing = args.url is None and args.cache is None and not args.teacher
    patient = Patient(
        url=DEFAULT_URL if nothing else args.url,
        cache=args.cache,
        teachers=teachers,
        options=teacher_options(args.option, teachers),
        api_key=key_of(args),
    )
    probing = Probing(tolerance=args.tolerance, rounds=args.rounds, max_probe_tokens=args.max_probe_tokens)
    findings = asyncio.run(examine(patient, probing))
    failed = [finding for finding in findings if finding.level == "fail"]
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print_table(findings)
    return 1 if failed else 0


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("check", "of", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        told = Text(finding.detail)
        if finding.way_out:
            told.append(f"\n-> {finding.way_out}", style="bold")
        level = Text(finding.level, style=_COLOURS[finding.level])
        table.add_row(Text(finding.check), Text(finding.subject), level, told)
    console = Console(highlight=False)
    console.print(table)
    counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items() if count))
