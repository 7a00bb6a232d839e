"""Does a teacher with another tokenizer help? A student with and without SmolLM2's projected targets, on three seeds.

Uses the cache of a finished demo, so run `make demo` first: SmolLM2's top-64 of about 10,000 tokens of technical
English is projected to a byte-level BPE of 1,024 ids that is trained on that text. All runs of a seed have the same
rows and steps, and are measured on the same held-out documents in bits per byte, at the end and at their best
evaluation. Exits 1 when the student with the projected teacher is not better in every seed.

    python -m benchmarks.teachers.bench_projected_student [--demo demo] [--seeds 3] [--steps 120]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from potstill.cache import Cache
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest
from potstill.cache.projection import ProjectionPlan, project
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data.held_out import choose_held_out
from potstill.student_trainer.demo.plan import CORPUS, TEACHER
from potstill.student_trainer.train.loop import train
from tests.support.tokenizers.small import trained

HELD_OUT = 0.25
HIDDEN = 128
ARMS: dict[str, dict[str, float]] = {
    "cross-entropy": {"alpha": 0.0},
    "projected": {"alpha": 0.5},
    "alm": {"alpha": 0.0, "alm": 0.5},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    if not (args.demo / "cache").is_dir():
        print(f"no finished demo in {args.demo}: run `make demo` first", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return compare(args.demo, Path(folder), args.seeds, args.steps)


def compare(demo: Path, folder: Path, seeds: list[int], steps: int) -> int:
    shutil.copytree(demo / "cache", folder / "cache")
    texts = [file.read_text(encoding="utf-8") for file in sorted((demo / "text").iterdir())]
    cache = Cache.open(folder / "cache", mode="r+")
    plan = IngestPlan(row_tokens=128)
    corpus = ingest(cache.root, "students", [demo / "text"], trained(texts, 1024), plan)
    report = project(cache, ProjectionPlan(corpus="students", teacher=TEACHER, source=CORPUS))
    print(json.dumps(report.tally.to_json()["all"]), flush=True)
    bits = bits_a_nat(corpus)
    worse = 0
    for seed in seeds:
        best = {}
        for arm, shares in ARMS.items():
            last, best[arm] = run(folder, f"{arm}-{seed}", shares, seed, steps)
            told = f"{last * bits:.4f} bits a byte at the end, {best[arm] * bits:.4f} at best"
            print(f"seed {seed}  {arm:15}  {told}", flush=True)
        worse += best["projected"] >= best["cross-entropy"]
    print(f"the projected teacher is better than none in {len(seeds) - worse} of {len(seeds)} seeds")
    return int(worse > 0)


def bits_a_nat(corpus: Corpus) -> float:
    """Bits a byte for a nat a label of the held-out rows, whose first tokens are not counted."""
    held = [corpus.row(row) for row in choose_held_out(corpus.document_rows, HELD_OUT, 0, corpus.name).tolist()]
    pieces = [corpus.tokenizer.id_to_token(token) or "" for row in held for token in row[1:].tolist()]
    return len(pieces) / sum(map(len, pieces)) / math.log(2)


def run(folder: Path, name: str, shares: dict[str, float], seed: int, steps: int) -> tuple[float, float]:
    """Train, and give the held-out cross-entropy at the end and at its best."""
    teachers = [{"name": TEACHER}] if any(shares.values()) else []
    config: dict[str, Any] = {
        "data": {"cache": str(folder / "cache"), "corpus": "students", "held_out": HELD_OUT},
        "teachers": teachers,
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "intermediate_size": 3 * HIDDEN,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            }
        },
        "train": {
            "out": str(folder / "runs" / name),
            "steps": steps,
            "batch_rows": 12,
            "micro_batch_rows": 12,
            "lr": 3e-3,
            "warmup": max(steps // 10, 1),
            "seed": seed,
            "eval_every": max(steps // 8, 1),
            "checkpoint_every": steps,
            **shares,
        },
    }
    result = train(TrainConfig.of(config)).held_out
    assert result is not None, "rows are held out"
    assert result.ce is not None, "they have labels"
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result.ce, min(record["held_out"]["ce"] for record in map(json.loads, lines) if "held_out" in record)


if __name__ == "__main__":
    sys.exit(main())
