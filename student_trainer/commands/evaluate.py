"""`potstill evaluate RUN_DIR`: a student on the rows it never saw."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "evaluate a trained student on held-out rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run of `potstill train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate the final model, or the newest checkpoint of a run that is not finished."""
    import json

    from potstill.cache.plurals import counted
    from potstill.student_trainer.progress import nats
    from potstill.student_trainer.run import evaluate_run

    found = evaluate_run(args.run_dir)
    if args.json:
        print(json.dumps(found.to_json()))
        return 0
    print(f"{counted(found.rows, 'held-out row')}, {counted(found.tokens, 'token')}")
    print(f"cross-entropy {nats(found.ce)} nats/token")
    for name, teacher in found.teachers.items():
        print(
            f"{name}: KL {teacher.kl:.4f} nats/token, same top-1 {teacher.top1_agreement:.1%}, "
            f"student mass on its top-k {teacher.student_mass_on_top_k:.1%}"
        )
    return 0
