"""`potstill demo`: the main job on a real small teacher, from text to a distilled student."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from potstill.student_trainer.demo.plan import DemoPlan
    from potstill.student_trainer.evaluate.result import TrainResult

SUMMARY = "distil a real small teacher, from text to report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where the teacher is unpacked and kept")
    parser.add_argument("--seed", type=int, default=0, help="of the students (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run every stage and print what came of it."""
    from rich.console import Console

    from potstill.student_trainer.demo.plan import DemoPlan
    from potstill.student_trainer.demo.run import run_demo
    from potstill.student_trainer.demo.smollm2 import default_models_folder

    console = Console()
    plan = DemoPlan(out=args.out, models=args.models or default_models_folder(), seed=args.seed)
    report = run_demo(plan, console, lambda p, student: _train(p, student, console))
    print_outcome(console, plan, report)
    return 0


def _train(plan: DemoPlan, student: str, console: Console) -> TrainResult:
    from potstill.student_trainer.launch.ray import train_with_ray
    from potstill.student_trainer.metrics.progress import showing
    from potstill.student_trainer.train.interrupt import stop_on_signals

    config = plan.train_config(student, plan.alpha if student == "distilled" else 0.0)
    with stop_on_signals() as stop, showing(config.train.steps, console) as show:
        result = train_with_ray(config, should_stop=stop, on_record=show)
    if not result.finished:
        raise KeyboardInterrupt
    return result


def print_outcome(console: Console, plan: DemoPlan, report: dict[str, Any]) -> None:
    """Print how the students compare, where everything is, and the commands to try next."""
    from rich.table import Table

    from potstill.student_trainer.demo.plan import TEACHER
    from potstill.student_trainer.demo.smollm2 import model_folder

    table = Table("student", "held-out loss", "KL to the teacher", "same top-1")
    for name, student in report["students"].items():
        numbers = f"{student['held_out_loss']:.4f}", f"{student['kl_to_teacher']:.4f}"
        table.add_row(name, *numbers, f"{student['top1_agreement']:.1%}")
    console.print(table)
    targets = report["targets"]
    console.print(
        f"top-{targets['k']} of {report['corpus']['positions']:,} positions in {targets['bytes_per_position']:.1f} "
        f"bytes each; {sum(report['seconds'].values()):.0f} s in all",
        highlight=False,
    )
    model = model_folder(plan.models)
    potstill = sys.argv[0] if Path(sys.argv[0]).name == "potstill" else "potstill"
    lines = (
        f"report: {plan.out / 'report.html'}",
        f"teacher: {model} (a model folder, for wherever one is asked for)",
        "next:",
        f"  {shlex.join([potstill, 'inspect', str(plan.cache)])}",
        f"  {shlex.join([potstill, 'serve', '--teacher', f'{TEACHER}={model}', '--cache', str(plan.cache)])}",
    )
    # Not folded at the terminal's width: they are to be copied.
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
