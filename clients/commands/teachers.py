"""`potstill teachers`: what a service serves, how many replicas of it; add, scale and remove teachers."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from potstill.cache.commands.tables import print_table
from potstill.cache.commands.teacher_options import key_and_value
from potstill.cache.entry_points import name_and_model
from potstill.cache.errors import InvalidInput
from potstill.cache.printable import printable
from potstill.cache.types import JSON
from potstill.clients.commands.service_options import add_service_options, key_of

if TYPE_CHECKING:
    from potstill.clients.http_admin import HttpAdmin

T = TypeVar("T")
SUMMARY = "list a running service's teachers; add, scale or remove one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|scale|add|remove")
    listing = actions.add_parser("list", help="every teacher, its state and replicas")
    scaling = actions.add_parser("scale", help="ask for another number of replicas, or for autoscaling")
    scaling.add_argument("name", metavar="NAME", help="the teacher's name on the service")
    scaling.add_argument("replicas", metavar="N", type=int, nargs="?", help="how many replicas to run")
    scaling.add_argument(
        "--autoscale", metavar="MIN:MAX:TOKENS", help="follow the waiting tokens: one replica for each TOKENS of them"
    )
    scaling.add_argument("--no-autoscale", action="store_true", help="end autoscaling, and run N replicas from now on")
    adding = actions.add_parser("add", help="serve one more model until the service ends")
    adding.add_argument("teacher", metavar="NAME=MODEL", help="a model name, a path, or the URL of another service")
    adding.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the teacher, like max_top_k=128"
    )
    adding.add_argument("--replicas", type=int, metavar="N", help="how many to run; more than one needs Ray")
    removing = actions.add_parser("remove", help="stop a teacher when its calls have ended")
    removing.add_argument("name", metavar="NAME", help="the teacher's name on the service")
    for action in (listing, scaling, adding, removing):
        add_service_options(action)
        action.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Do one of them; returns the exit status.

    Raises:
        PotstillError: what the service refuses, or an argument that makes no sense.
    """
    {"list": _list, "scale": _scale, "add": _add, "remove": _remove}[args.action](args)
    return 0


def _list(args: argparse.Namespace) -> None:
    teachers = _ask(args, _with_replicas)
    if args.json:
        print(json.dumps(teachers, indent=2))
    else:
        _print_teachers(teachers)
        _print_replicas(teachers)


async def _with_replicas(admin: HttpAdmin) -> list[dict[str, Any]]:
    teachers = await admin.teachers()
    for teacher in teachers:
        if teacher.get("state") == "ready":
            teacher["replicas"] = await admin.replicas(str(teacher.get("name")))
    return teachers


def _scale(args: argparse.Namespace) -> None:
    wanted = _wanted_replicas(args)
    status = _ask(args, lambda admin: admin.change_replicas(args.name, wanted))
    print(json.dumps(status) if args.json else printable(f"{args.name}: {_replicas(status)}"))


def _add(args: argparse.Namespace) -> None:
    name, model = name_and_model(args.teacher, "the teacher")
    wanted: dict[str, JSON] = {"model": model}
    if args.option:
        wanted["options"] = dict(map(key_and_value, args.option))
    if args.replicas is not None:
        wanted["replicas"] = args.replicas
    teacher = _ask(args, lambda admin: admin.add(name, wanted))
    print(json.dumps(teacher) if args.json else printable(f"{name}: {teacher.get('state')}"))


def _remove(args: argparse.Namespace) -> None:
    teacher = _ask(args, lambda admin: admin.remove(args.name))
    print(json.dumps(teacher) if args.json else printable(f"{args.name}: {teacher.get('state')}"))


def _ask(args: argparse.Namespace, call: Callable[[HttpAdmin], Awaitable[T]]) -> T:
    from potstill.clients.http_admin import HttpAdmin

    api_key = key_of(args)

    async def asked() -> T:
        async with HttpAdmin.open(args.url, api_key=api_key) as admin:
            return await call(admin)

    return asyncio.run(asked())


def _wanted_replicas(args: argparse.Namespace) -> dict[str, JSON]:
    if (args.replicas is None) == (args.autoscale is None):
        raise InvalidInput("give either N, a number of replicas, or --autoscale MIN:MAX:TOKENS")
    if args.autoscale is None:
        return {"replicas": args.replicas, **({"autoscale": None} if args.no_autoscale else {})}
    parts = args.autoscale.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInput(f"--autoscale {args.autoscale!r}: write MIN:MAX:TOKENS, like 1:4:20000")
    least, most, tokens = (int(part) for part in parts)
    return {"autoscale": {"min": least, "max": most, "tokens_per_replica": tokens}}


def _print_teachers(teachers: list[dict[str, Any]]) -> None:
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "teacher": lambda of: of.get("name"),
        "state": lambda of: of.get("state"),
        "model": lambda of: of.get("identity", {}).get("model", "-"),
        "vocabulary": lambda of: of.get("identity", {}).get("vocab_size", "-"),
        "dtype": lambda of: of.get("identity", {}).get("dtype", "-"),
        "max k": lambda of: of.get("limits", {}).get("max_top_k", "-"),
        "replicas": lambda of: _replicas(of["replicas"]) if "replicas" in of else of.get("failure", "-"),
    }
    print_table(columns, teachers)


def _print_replicas(teachers: list[dict[str, Any]]) -> None:
    each = [{"teacher": of.get("name"), **one} for of in teachers for one in of.get("replicas", {}).get("each", ())]
    if each:
        print()
        columns: dict[str, Callable[[dict[str, Any]], object]] = {
            "teacher": lambda of: of.get("teacher"),
            "replica": lambda of: of.get("name", "-"),
            "state": lambda of: of.get("state", "-"),
            "tokens waiting": lambda of: of.get("tokens_waiting", "-"),
            "tokens scored": lambda of: of.get("tokens_scored", "-"),
        }
        print_table(columns, each)


def _replicas(status: dict[str, Any]) -> str:
    running, target, most = (status.get(key, "?") for key in ("replicas", "target", "max"))
    return f"{running} of at most {most}" if running == target else f"{running} -> {target} of at most {most}"
