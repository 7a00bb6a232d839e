"""`potstill keys`: add, list and remove the API keys of a service."""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.keys_file import add_key, read_keys, remove_key
from potstill.teacher_service.access.quotas import Quota

SUMMARY = "add, list and remove the API keys of a service"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|list|remove")
    adding = actions.add_parser("add", help="make a key and print it, this once", allow_abbrev=False)
    listing = actions.add_parser("list", help="every key's name, role and quota", allow_abbrev=False)
    removing = actions.add_parser("remove", help="take a key away; a running service notices", allow_abbrev=False)
    for action in (adding, removing):
        action.add_argument("name", metavar="NAME", help="whose key it is")
    adding.add_argument(
        "--role",
        required=True,
        choices=[role.value for role in Role],
        help="trainer: score and read; batch: also fill; admin: everything",
    )
    adding.add_argument("--tokens-per-minute", type=int, metavar="N", help="scored tokens; hits are free")
    adding.add_argument("--tokens-per-day", type=int, metavar="N", help="scored tokens, per day in UTC")
    for action in (adding, listing, removing):
        action.add_argument("--file", type=Path, required=True, metavar="KEYS.toml", help="[access] keys_file")


def run(args: argparse.Namespace) -> int:
    """Change or show the file; returns the exit status.

    Raises:
        InvalidInput: a file that cannot be used, or a bad name or number. AlreadyExists, NotFound: of the name.
    """
    if args.action == "add":
        quota = Quota(tokens_per_minute=args.tokens_per_minute, tokens_per_day=args.tokens_per_day)
        print(add_key(args.file, args.name, Role(args.role), quota))  # noqa: T201  what the command is for
    elif args.action == "remove":
        remove_key(args.file, args.name)
    else:
        for record in read_keys(args.file).values():
            limits = (("a minute", record.quota.tokens_per_minute), ("a day", record.quota.tokens_per_day))
            quotas = [f"{limit} tokens {span}" for span, limit in limits if limit is not None]
            print("\t".join([record.name, record.role.value, *quotas]))  # noqa: T201
    return 0
