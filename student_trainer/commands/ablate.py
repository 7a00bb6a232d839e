"""`potstill ablate GRID.toml`: train a student in several ways, and tell what each choice is worth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from potstill.student_trainer.ablate.comparison import Comparison
    from potstill.student_trainer.ablate.grid import GridConfig
    from potstill.student_trainer.ablate.outcome import Failure, Outcome
    from potstill.student_trainer.ablate.progress import Shown
    from potstill.student_trainer.ablate.runs import Run
    from potstill.student_trainer.train.interrupt import StopRequest

SUMMARY = "train in several ways over several seeds, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("grid", metavar="GRID.toml", type=Path, help="the run, what is changed in it, and the seeds")
    parser.add_argument("--out", metavar="DIR", help="the ablation's folder, instead of the file's out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="the page; default report.html in that folder")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--no-ray", action="store_true", help="train in this process, one run after the other")
    place.add_argument("--ray", metavar="ADDRESS", help="use this Ray cluster; by default Ray is started here")


def run(args: argparse.Namespace) -> int:
    """Train what is left to train, then compare. 0 when all runs ended; 1 if some failed; 128 + signal when stopped."""
    import json

    from rich.console import Console

    from potstill.student_trainer.ablate.grid import GridConfig

    # Told at once if it is wrong: what follows takes torch, and so many seconds, to import.
    grid = GridConfig.from_toml(args.grid, out=args.out)
    from potstill.student_trainer.ablate.comparison import compare
    from potstill.student_trainer.ablate.outcome import Failure
    from potstill.student_trainer.ablate.page import write_page
    from potstill.student_trainer.ablate.progress import showing
    from potstill.student_trainer.ablate.runs import outcomes_there, plan_runs
    from potstill.student_trainer.train.interrupt import stop_on_signals

    console = Console(stderr=args.json)
    runs = plan_runs(grid)
    found = outcomes_there(runs, Path(grid.out))
    left = [each for each in runs if (each.cell, each.seed) not in found]
    console.print(f"{len(grid.all_cells)} cells, {len(grid.seeds)} seeds: {len(found)} runs there, {len(left)} to go")
    failures = []
    with stop_on_signals() as stop, showing(left, console) as shown:
        for each in _trained(left, grid, args, stop, shown):
            shown.end(each)
            if isinstance(each, Failure):
                failures.append(each)
            else:
                found[each.cell, each.seed] = each
    if stop():
        console.print(f"stopped: {len(found)} of {len(runs)} runs ended; the same command goes on from there")
        return 128 + stop.signal_number
    comparison = compare(grid, found, failures)
    page = write_page(args.html or Path(grid.out) / "report.html", comparison, grid, found)
    if args.json:
        print(json.dumps(comparison.to_json()))
    else:
        _print(console, comparison, page)
    return 1 if failures else 0


def _trained(
    runs: Sequence[Run], grid: GridConfig, args: argparse.Namespace, stop: StopRequest, shown: Shown
) -> Iterator[Outcome | Failure]:
    if not args.no_ray:
        if runs:
            from potstill.student_trainer.ablate.on_ray import run_on_ray

            yield from run_on_ray(runs, grid, address=args.ray, should_stop=stop, while_waiting=shown)
        return
    from potstill.student_trainer.ablate.runs import run_here

    for run in runs:
        found = None if stop() else run_here(run, Path(grid.out), stop, lambda _: shown())
        if found is not None:
            yield found


def _print(console: Console, comparison: Comparison, page: Path) -> None:
    from potstill.student_trainer.ablate.table import notes, tables

    for table in tables(comparison):
        console.print(table)
    for line in (*notes(comparison), f"page: {page}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
