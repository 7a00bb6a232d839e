"""Attacks on a running service: each alone, before and after, and all at once beside callers who behave.

    python -m benchmarks.bench_abuse --each [--only WORDS] [--before REVISION]
    python -m benchmarks.bench_abuse [--minutes 10] [--clients 20]

`--each` starts a `potstill serve` for each attack and prints the peak of its memory and its slowest `GET /healthz`;
with `--before` by the code of that revision first. It exits 1 when memory grows by over 300 MiB or a probe
takes over 1 s.

Without it one service with TLS is attacked in all ways at once, again and again, for ten minutes, while callers with
another key score rows and read targets with the clients that users have. It exits 1 when one of their calls ends with
an error or memory grows by over 2.25 GiB, which the limits promise.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import benchmarks.abuse
from benchmarks.abuse.attack import Attack
from benchmarks.abuse.callers import Callers, calling
from benchmarks.abuse.service import HERE, Damage, Service, code_of, probing, serving
from benchmarks.abuse.siege import besieging, together

MAX_GROWN_BYTES = 300 * 2**20
MAX_PROBE_SECONDS = 1.0
PROMISED_BYTES = int(2.25 * 2**30)
QUIET_SECONDS = 30.0


def all_attacks() -> list[Attack]:
    """Every attack of the files beside, by its number."""
    names = [f"benchmarks.abuse.{module.name}" for module in pkgutil.iter_modules(benchmarks.abuse.__path__)]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".served")]
    found = [attack for module in modules for attack in getattr(module, "ATTACKS", ())]
    return sorted(found, key=lambda attack: (attack.row, attack.name))


def tried(attack: Attack, tree: Path) -> Damage:
    """Try the attack on a new service by the code of `tree`."""
    with tempfile.TemporaryDirectory() as folder, serving(attack, tree, Path(folder)) as service:
        return service.suffer(attack)


def cells(damage: Damage) -> tuple[str, str]:
    """Memory and the slowest probe, for the table."""
    if damage.died:
        return "died", "-"
    failed = f" ({damage.failed_probes} failed)" if damage.failed_probes else ""
    return f"+{damage.grown_bytes / 2**20:,.0f} MiB", f"{damage.longest_probe:.2f} s{failed}"


def holds(damage: Damage) -> bool:
    """True where the service stayed within the bounds."""
    quick = damage.longest_probe <= MAX_PROBE_SECONDS and not damage.failed_probes
    return quick and not damage.died and damage.grown_bytes <= MAX_GROWN_BYTES


def each(words: str, before: str) -> int:
    """Try each attack whose name or number has `words`; returns the exit status."""
    console = Console(width=140)
    table = Table("#", "attack", *(["memory before", "healthz before"] if before else []), "memory", "healthz")
    chosen = [attack for attack in all_attacks() if words in (str(attack.row), "") or words in attack.name]
    failed = 0
    with code_of(before) as old:
        for attack in chosen:
            then = cells(tried(attack, old)) if before else ()
            now = tried(attack, HERE)
            failed += not holds(now)
            table.add_row(str(attack.row), attack.name, *then, *cells(now), style="" if holds(now) else "bold")
            console.print(f"{attack.row} {attack.name}: {' '.join([*then, '->', *cells(now)])}", highlight=False)
    console.print(table)
    console.print(f"{len(chosen) - failed} of {len(chosen)} within 300 MiB and 1 s")
    return 1 if failed or not chosen else 0


def siege(minutes: float, clients: int) -> int:
    """Attack in all ways at once beside callers who behave; returns the exit status."""
    attacks = [attack for attack in all_attacks() if attack.keys]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        service = stack.enter_context(serving(together(attacks), HERE, folder))
        os.environ["SSL_CERT_FILE"] = str(folder / "cert.pem")  # which the callers' httpx trusts
        callers = stack.enter_context(calling(service, clients))
        _pass(service, callers, QUIET_SECONDS)
        quiet = callers.take()
        print(quiet.line("quiet"), flush=True)
        service.reset_peak()
        before = service.resident_bytes
        with besieging(attacks, service.door), probing(service.door) as probes:
            _pass(service, callers, minutes * 60)
            besieged = callers.take()
        grown, kept, logged = service.peak_bytes - before, service.resident_bytes - before, service.log_bytes
    print(besieged.line(f"{len(attacks)} attacks at once for {minutes:g} minutes"))
    print(f"memory: peak +{grown / 2**20:,.0f} MiB, +{kept / 2**20:,.0f} MiB at the end; log {logged:,} bytes")
    p50, p99 = np.percentile(probes.seconds, [50, 99])
    print(f"/healthz: p50 {p50:.3f} s, p99 {p99:.3f} s, longest {max(probes.seconds):.2f} s, {probes.failed} failed")
    for error, count in (quiet.errors + besieged.errors + probes.errors).most_common(10):
        print(f"  {count} times {error}")
    return 1 if quiet.errors or besieged.errors or grown > PROMISED_BYTES else 0


def _pass(service: Service, callers: Callers, seconds: float) -> None:
    """Let time pass, and say every half a minute how it goes."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not service.died:
        time.sleep(min(30.0, left))
        print(f"  {service.resident_bytes / 2**20:,.0f} MiB, {callers.calls:,} calls, {left:,.0f} s left", flush=True)


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="each attack alone, on a service of its own")
    parser.add_argument("--only", default="", metavar="WORDS", help="the attacks with this number or these words")
    parser.add_argument("--before", default="", metavar="REVISION", help="also by the code of this revision, first")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the attack in all ways at once")
    parser.add_argument("--clients", type=int, default=20, help="callers beside it who behave")
    args = parser.parse_args()
    return each(args.only, args.before) if args.each else siege(args.minutes, args.clients)


if __name__ == "__main__":
    sys.exit(main())
