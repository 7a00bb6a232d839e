"""`potstill estimate`: print the bytes, objects and cost of targets before a teacher is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from potstill.cache.commands.field_options import add_wish_options, fields_of
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.upkeep.estimate import Basis, Estimate, Prices, Workload

SUMMARY = "bytes, objects and cost of targets before they are made"

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--positions", default="1B", metavar="P", help="like 500B or 2.5e9 (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=131_072, metavar="V", help="(default %(default)s)")
    parser.add_argument("--teachers", type=int, default=1, metavar="N", help="(default %(default)s)")
    add_wish_options(parser)
    parser.add_argument("--encoding", help="this one only (default: each)")
    parser.add_argument("--shard-positions", type=int, metavar="N", help="positions a shard (default: as of `ingest`)")
    parser.add_argument("--price", type=float, default=0.023, metavar="USD", help="a GiB-month (default %(default)s)")
    parser.add_argument(
        "--put-price", type=float, default=0.005, metavar="USD", help="1,000 puts (default %(default)s)"
    )
    about = "measure this cache instead of using the built-in table"
    add_root_argument(parser, "--like", required=False, about=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print an estimate for each encoding."""
    from potstill.cache.cache import Cache
    from potstill.cache.encoding import ENCODINGS
    from potstill.cache.encoding.fields import keeps
    from potstill.cache.upkeep.estimate import TABLE, Prices, Workload, estimate, measure

    fields = fields_of(args)
    workload = Workload(
        positions=_count(args.positions),
        vocab_size=args.vocab_size,
        fields=fields,
        teachers=args.teachers,
        shard_positions=args.shard_positions,
    )
    prices = Prices(gib_month=args.price, thousand_puts=args.put_price)
    basis = measure(Cache.open(args.cache), fields) if args.cache else TABLE
    names = [args.encoding] if args.encoding else [name for name in ENCODINGS if keeps(fields, ENCODINGS[name])]
    found = [estimate(workload, name, prices, basis) for name in names]
    if args.json:
        print(json.dumps(_to_json(workload, prices, basis, found), indent=1))
    else:
        _print_table(workload, prices, basis, found)
    return 0


def _to_json(workload: Workload, prices: Prices, basis: Basis, found: list[Estimate]) -> dict[str, Any]:
    return {
        "positions": workload.positions,
        "vocab_size": workload.vocab_size,
        "fields": workload.fields.to_json(),
        "teachers": workload.teachers,
        "shards": workload.shards,
        "prices": {"gib_month": prices.gib_month, "thousand_puts": prices.thousand_puts},
        "basis": basis.source,
        "encodings": {each.encoding: each.to_json() for each in found},
    }


def _print_table(workload: Workload, prices: Prices, basis: Basis, found: list[Estimate]) -> None:
    columns: dict[str, Callable[[Estimate], str]] = {
        "encoding": lambda each: each.encoding,
        "bytes/position": lambda each: f"{each.bytes_per_position:.1f} ± {each.spread:.0%}",
        "bytes": lambda each: decimal(each.num_bytes),
        "objects": lambda each: f"{each.objects:,}",
        "puts": lambda each: f"{each.write_requests:,}",
        "USD a month": lambda each: f"{each.month:,.2f}",
        "USD once": lambda each: f"{each.write:,.2f}",
    }
    teachers = f" x {workload.teachers} teachers" if workload.teachers > 1 else ""
    positions, shards = counted(workload.positions, "position"), counted(workload.shards, "shard")
    print_table(columns, found, title=f"{positions}{teachers}, V={workload.vocab_size:,}, {shards} each")
    print(
        f"bytes {basis.source}; {prices.gib_month} USD a GiB-month, {prices.thousand_puts} USD for 1,000 puts, "
        "without transfer; the corpus itself takes about 2 bytes a position once"
    )


def _count(text: str) -> int:
    unit = text[-1:] if text[-1:] in _UNITS else ""
    try:
        value = float(text.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**62:
        raise InvalidInput(f"--positions {text!r} must be a number of at least 1, like 2.5e9, 500B or 40M")
    return round(value)
