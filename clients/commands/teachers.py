"""`potstill teachers`: what a service serves, and how many replicas of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

SUMMARY = "list the teachers of a running service, or scale one"
_DEFAULT_URL = "http://127.0.0.1:8700"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|scale")
    listing = actions.add_parser("list", help="every teacher, its state and replicas")
    scaling = actions.add_parser("scale", help="ask for another number of replicas")
    scaling.add_argument("name", metavar="NAME", help="the teacher's name on the service")
    scaling.add_argument("replicas", metavar="N", type=int, help="how many replicas to run")
    for action in (listing, scaling):
        action.add_argument("--url", default=_DEFAULT_URL, help="the service (default: %(default)s)")
        action.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """List or scale; returns the exit status."""
    import asyncio

    from clients import http_teacher

    if args.action == "scale":
        status = asyncio.run(http_teacher.put_replicas(args.url, args.name, args.replicas))
        print(json.dumps(status) if args.json else f"{args.name}: {_replicas(status)}")
        return 0
    teachers = asyncio.run(_described(args.url))
    if args.json:
        print(json.dumps(teachers, indent=2))
    else:
        _print_table(teachers)
    return 0


async def _described(url: str) -> list[dict[str, Any]]:
    from clients import http_teacher

    teachers = await http_teacher.list_teachers(url)
    for teacher in teachers:
        if teacher.get("state") == "ready":
            teacher["replicas"] = await http_teacher.get_replicas(url, str(teacher.get("name")))
    return teachers


def _print_table(teachers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("teacher", "state", "model", "vocabulary", "dtype", "max k", "replicas"):
        table.add_column(heading, overflow="fold")
    for teacher in teachers:
        identity, limits = teacher.get("identity", {}), teacher.get("limits", {})
        cells = (
            teacher.get("name"),
            teacher.get("state"),
            identity.get("model", "-"),
            identity.get("vocab_size", "-"),
            identity.get("dtype", "-"),
            limits.get("max_top_k", "-"),
            _replicas(teacher["replicas"]) if "replicas" in teacher else "-",
        )
        table.add_row(*(str(cell) for cell in cells))
    Console(markup=False, highlight=False).print(table)


def _replicas(status: dict[str, Any]) -> str:
    running, target, most = (status.get(key, "?") for key in ("replicas", "target", "max"))
    return f"{running} of at most {most}" if running == target else f"{running} -> {target} of at most {most}"
