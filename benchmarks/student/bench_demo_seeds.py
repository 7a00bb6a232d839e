"""Does the distilled student beat the cross-entropy one? The demo's two students over three seeds, same rows and steps.

Uses the cache of a finished demo, so run `make demo` first. Exits 1 when a distilled student's held-out loss is not
the lower one, at the end or at the other one's best evaluation.

    python benchmarks/student/bench_demo_seeds.py [--demo demo] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.demo.plan import TEACHER, DemoPlan
from potstill.student_trainer.train.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if not (args.demo / "report.json").is_file():
        print(f"no finished demo in {args.demo}: run `make demo` first", file=sys.stderr)
        return 1
    plan = DemoPlan(out=args.demo, models=args.demo)
    print("seed  student         held-out loss (best)   KL to teacher   same top-1")
    worse = 0
    for seed in range(args.seeds):
        ce = run(plan, seed, "cross-entropy", 0.0)
        kd = run(plan, seed, "distilled", plan.alpha)
        worse += kd["loss"] >= ce["loss"] or kd["best"] >= ce["best"]
    print(f"distilled is better in {args.seeds - worse} of {args.seeds} seeds")
    return int(worse > 0)


def run(plan: DemoPlan, seed: int, student: str, alpha: float) -> dict[str, float]:
    config = replace(plan, seed=seed).train_config(student, alpha).to_json()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {**config}
        settings["train"] = {**settings["train"], "out": folder}
        held_out = train(TrainConfig.of(settings)).held_out
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert held_out is not None, "the demo always holds rows out"
    assert held_out.ce is not None, "a held-out row has a label"
    best = min(record["held_out"]["ce"] for record in map(json.loads, lines) if "held_out" in record)
    of_teacher = held_out.teachers[TEACHER]
    print(
        f"{seed:4}  {student:14}  {held_out.ce:.4f} ({best:.4f})        {of_teacher.kl:.4f}          "
        f"{of_teacher.top1_agreement:.1%}",
        flush=True,
    )
    return {"loss": held_out.ce, "best": best}


if __name__ == "__main__":
    sys.exit(main())
