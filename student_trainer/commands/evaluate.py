"""`potstill evaluate RUN`: a student on the rows it never saw."""

from __future__ import annotations

import argparse

SUMMARY = "evaluate a student on held-out rows and evaluation corpora"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="the folder or URL of a run of `potstill train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate the final model, or the newest checkpoint of a run that is not finished."""
    import json

    from potstill.cache.plurals import counted
    from potstill.student_trainer.evaluate.result import HELD_OUT, evaluations_to_json
    from potstill.student_trainer.metrics.progress import nats
    from potstill.student_trainer.train.run import evaluate_run

    found = evaluate_run(args.run)
    if args.json:
        held_out = found.pop(HELD_OUT).to_json() if HELD_OUT in found else {}
        print(json.dumps(held_out | evaluations_to_json(found)))
        return 0
    for name, one in found.items():
        rows = counted(one.rows, "held-out row") if name == HELD_OUT else f"{name}: {counted(one.rows, 'row')}"
        print(f"{rows}, {counted(one.tokens, 'token')}")
        print(f"cross-entropy {nats(one.ce)} nats/token")
        for teacher, agreement in one.teachers.items():
            print(
                f"{teacher}: KL {agreement.kl:.4f} nats/token, same top-1 {agreement.top1_agreement:.1%}, "
                f"student mass on its top-k {agreement.student_mass_on_top_k:.1%}"
            )
    return 0
