"""`potstill estimate`: print what targets take, and what scoring and training take, before a teacher is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from potstill.cache.commands.field_options import add_wish_options, fields_of
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.commands.tables import print_table
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted

if TYPE_CHECKING:
    from potstill.cache.upkeep.compute import Compute, Devices
    from potstill.cache.upkeep.estimate import Basis, Estimate, Prices, Workload

SUMMARY = "bytes, GPU time and cost of targets before they are made"

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
    _add_compute_arguments(parser)
    about = "measure this cache instead of using the built-in table"
    add_root_argument(parser, "--like", required=False, about=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPU time, where parameters are given")
    group.add_argument(
        "--teacher-parameters",
        action="append",
        default=[],
        metavar="P",
        help="of a teacher, like 7.2B; repeatable",
    )
    group.add_argument("--student-parameters", metavar="P", help="of the student, like 1.4B")
    group.add_argument("--passes", type=float, default=1.0, metavar="N", help="of the student (default %(default)s)")
    group.add_argument("--gpus", type=int, default=8, metavar="N", help="that share the work (default %(default)s)")
    group.add_argument(
        "--gpu-flops",
        default="989T",
        metavar="F",
        help="peak a second of one (default %(default)s, an H100)",
    )
    group.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default %(default)s)")
    group.add_argument("--gpu-hour", type=float, default=2.5, metavar="USD", help="price of one (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print an estimate for each encoding, and of the GPU time where parameters are given."""
    from potstill.cache.cache import Cache
    from potstill.cache.encoding import ENCODINGS
    from potstill.cache.encoding.fields import keeps
    from potstill.cache.upkeep.estimate import TABLE, Prices, Workload, estimate, measure

    fields = fields_of(args)
    workload = Workload(
        positions=_count(args.positions, "--positions"),
        vocab_size=args.vocab_size,
        fields=fields,
        teachers=args.teachers,
        shard_positions=args.shard_positions,
    )
    prices = Prices(gib_month=args.price, thousand_puts=args.put_price)
    basis = measure(Cache.open(args.cache), fields) if args.cache else TABLE
    names = [args.encoding] if args.encoding else [name for name in ENCODINGS if keeps(fields, ENCODINGS[name])]
    found = [estimate(workload, name, prices, basis) for name in names]
    devices, computed = _computed(args, workload)
    if args.json:
        told = {"compute": {"devices": asdict(devices), "models": [asdict(each) for each in computed]}}
        print(json.dumps(_to_json(workload, prices, basis, found) | (told if computed else {}), indent=1))
    else:
        _print_table(workload, prices, basis, found)
        _print_compute(devices, computed)
    return 0


def _computed(args: argparse.Namespace, workload: Workload) -> tuple[Devices, list[Compute]]:
    from potstill.cache.upkeep.compute import Devices, compute

    teachers = [_count(each, "--teacher-parameters") for each in args.teacher_parameters]
    student = None if args.student_parameters is None else _count(args.student_parameters, "--student-parameters")
    devices = Devices(
        count=args.gpus, peak_flops=_count(args.gpu_flops, "--gpu-flops"), mfu=args.mfu, hour_price=args.gpu_hour
    )
    return devices, compute(workload.positions, teachers, student, devices, passes=args.passes)


def _print_compute(devices: Devices, found: list[Compute]) -> None:
    if not found:
        return
    columns: dict[str, Callable[[Compute], str]] = {
        "work": lambda each: each.work,
        "parameters": lambda each: f"{each.parameters / 1e9:,.3g} B",
        "operations": lambda each: f"{each.operations:.2g}",
        "GPU hours": lambda each: f"{each.device_hours:,.0f}",
        "days": lambda each: f"{each.days:,.1f}",
        "USD": lambda each: f"{each.cost:,.0f}",
    }
    print()
    print_table(columns, found, title=f"GPU time, on {counted(devices.count, 'GPU')}")
    hours, cost = (sum(getattr(each, name) for each in found) for name in ("device_hours", "cost"))
    print(
        f"in all {hours:,.0f} GPU hours, {cost:,.0f} USD; 2 operations a parameter and position of a teacher, 6 of a "
        f"student, at {devices.mfu:.0%} of {devices.peak_flops / 1e12:,.0f} teraflops; {devices.hour_price} USD an hour"
    )


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


def _count(text: str, option: str) -> int:
    unit = text[-1:] if text[-1:] in _UNITS else ""
    try:
        value = float(text.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**62:
        raise InvalidInput(f"{option} {text!r} must be a number of at least 1, like 2.5e9, 500B or 40M")
    return round(value)
