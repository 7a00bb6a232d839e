"""Attacks on a running service: each alone, before and after, and all at once beside callers who behave.

    python -m benchmarks.bench_abuse --each [--only WORDS] [--before REVISION]
    python -m benchmarks.bench_abuse [--minutes 10] [--clients 20]

`--each` starts a `potstill serve` for each attack and prints the peak of its memory and its slowest `GET /healthz`;
with `--before` by the code of that revision first. It exits 1 when memory grows by over 300 MiB or a probe
takes over 1 s.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import benchmarks.abuse
from benchmarks.abuse.attack import Attack
from benchmarks.abuse.service import Damage, code_of, serving

MAX_GROWN_BYTES = 300 * 2**20
MAX_PROBE_SECONDS = 1.0


def all_attacks() -> list[Attack]:
    """Every attack of the files beside, by its number."""
    names = [f"benchmarks.abuse.{module.name}" for module in pkgutil.iter_modules(benchmarks.abuse.__path__)]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".served")]
    found = [attack for module in modules for attack in getattr(module, "ATTACKS", ())]
    return sorted(found, key=lambda attack: (attack.row, attack.name))


def tried(attack: Attack, tree: Path) -> Damage:
    """What the attack costs a new service by the code of `tree`."""
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
            now = tried(attack, Path(__file__).parents[1])
            failed += not holds(now)
            table.add_row(str(attack.row), attack.name, *then, *cells(now), style="" if holds(now) else "bold")
            console.print(f"{attack.row} {attack.name}: {' '.join([*then, '->', *cells(now)])}", highlight=False)
    console.print(table)
    console.print(f"{len(chosen) - failed} of {len(chosen)} within 300 MiB and 1 s")
    return 1 if failed or not chosen else 0


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="each attack alone, on a service of its own")
    parser.add_argument("--only", default="", metavar="WORDS", help="the attacks with this number or these words")
    parser.add_argument("--before", default="", metavar="REVISION", help="also by the code of this revision, first")
    args = parser.parse_args()
    return each(args.only, args.before)


if __name__ == "__main__":
    sys.exit(main())
