"""Does a teacher with another tokenizer help? A student with and without its projected targets, over three seeds.

A teacher (byte-level BPE, 2,048 ids) is trained on the documents of `pydoc_data.topics` but those held out; a smaller
student (1,024 ids, trained on Python code) sees a part of these, for more epochs than do it good. All runs of a
seed have the same rows and steps, and are measured on the same held-out documents in bits per byte, at the end and at
their best evaluation. Exits 1 when a student with the projected teacher is not better in every seed.

    python -m benchmarks.teachers.bench_projected_student [--seeds 3] [--steps 120]
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pydoc_data.topics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from potstill.cache import Cache, Fields, Provenance, Targets
from potstill.cache.corpus import Corpus, IngestPlan
from potstill.cache.corpus.ingest import ingest
from potstill.cache.projection import ProjectionPlan, project
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.data.held_out import choose_held_out
from potstill.student_trainer.train.loop import train
from tests.support.fakes import fake_identity
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import write

K = 64
ROW = 128
HELD_OUT = 0.3
ARMS: dict[str, dict[str, float]] = {
    "cross-entropy": {"alpha": 0.0},
    "projected": {"alpha": 0.5},
    "projected, alm": {"alpha": 0.5, "alm": 0.25},
}
MADE = Provenance(engine="transformers", engine_version="", device="cpu", capture_path="dense forward")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a run takes."""

    hidden: int
    layers: int
    steps: int
    lr: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--teacher-steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), args.seeds, args.steps, args.teacher_steps)


def compare(folder: Path, seeds: int, steps: int, teacher_steps: int) -> int:
    documents = [text[:6000] for text in pydoc_data.topics.topics.values() if len(text) > 400]
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents)).tolist()]
    part = documents[: len(documents) // 3]
    theirs, mine = trained(documents, 2048), trained([inspect.getsource(argparse), inspect.getsource(inspect)], 1024)
    source = write(folder / "part", part)
    cache = Cache.open(folder / "cache", mode="r+")
    for name, tokenizer in (("teachers", theirs), ("students", mine)):
        ingest(cache.root, name, [source], tokenizer, IngestPlan(row_tokens=ROW))
    corpus = cache.corpus("students")
    rows = choose_held_out(corpus.document_rows, HELD_OUT, 0, "students")
    held = set(np.searchsorted(corpus.document_rows, rows, side="right").tolist())
    unseen = [text for number, text in enumerate(part, start=1) if number in held]
    seen = [text for text in documents if text not in unseen]
    ingest(cache.root, "all", [write(folder / "seen", seen)], theirs, IngestPlan(row_tokens=ROW))
    print(
        f"teacher: {len(seen)} documents; student: {len(part) - len(unseen)} of them; held out: {len(unseen)}",
        flush=True,
    )
    began = time.perf_counter()
    run(folder, "all", "teacher", {"alpha": 0.0}, 0, Sizes(160, 3, teacher_steps, 3e-3))
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "teacher" / "model", dtype=torch.float32)
    score(cache, cache.corpus("teachers"), model)
    report = project(cache.fresh(), ProjectionPlan(corpus="students", teacher="other", source="teachers"))
    print(f"teacher trained, scored and projected in {time.perf_counter() - began:.0f} s:")
    print("  ", json.dumps(report.tally.to_json()["all"]), flush=True)
    bits = bits_a_nat(corpus, rows, unseen)
    worse = 0
    for seed in range(seeds):
        found = {}
        for arm, shares in ARMS.items():
            last, best = run(folder, "students", f"{arm}-{seed}", shares, seed, Sizes(128, 2, steps, 3e-3))
            found[arm] = best
            print(
                f"seed {seed}  {arm:15}  {last * bits:.4f} bits a byte at the end, {best * bits:.4f} at best",
                flush=True,
            )
        worse += found["projected"] >= found["cross-entropy"]
    print(f"the projected teacher is better than none in {seeds - worse} of {seeds} seeds")
    return int(worse > 0)


def bits_a_nat(corpus: Corpus, rows: NDArray[np.int64], texts: list[str]) -> float:
    """Bits a byte for a nat a label of the held-out rows."""
    labels = int(np.diff(corpus.row_ranges(rows), axis=1).sum()) - len(rows)
    return labels / sum(len(text.encode()) for text in texts) / math.log(2)


def run(folder: Path, corpus: str, name: str, shares: dict[str, float], seed: int, sizes: Sizes) -> tuple[float, float]:
    """Train, and give the held-out cross-entropy at the end and at its best."""
    teachers = [{"name": "other"}] if any(shares.values()) else []
    config: dict[str, Any] = {
        "data": {"cache": str(folder / "cache"), "corpus": corpus, "held_out": HELD_OUT},
        "teachers": teachers,
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": sizes.hidden,
                "intermediate_size": 3 * sizes.hidden,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            }
        },
        "train": {
            "out": str(folder / "runs" / name),
            "steps": sizes.steps,
            "batch_rows": 12,
            "micro_batch_rows": 12,
            "lr": sizes.lr,
            "warmup": max(sizes.steps // 10, 1),
            "seed": seed,
            "eval_every": max(sizes.steps // 8, 1),
            "checkpoint_every": sizes.steps,
            **shares,
        },
    }
    result = train(TrainConfig.of(config)).held_out
    assert result is not None, "rows are held out"
    assert result.ce is not None, "they have labels"
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result.ce, min(record["held_out"]["ce"] for record in map(json.loads, lines) if "held_out" in record)


@torch.no_grad()
def score(cache: Cache, corpus: Corpus, model: PreTrainedModel) -> None:
    """Keep the teacher's top-64."""
    identity = fake_identity(vocab_size=model.config.vocab_size, tokenizer_sha256=corpus.tokenizer_sha256)
    planned = cache.plan_targets("other", corpus.name, identity, fields=Fields(k=K))
    for shard in range(corpus.num_shards):
        start, stop = corpus.shard_rows[shard : shard + 2].tolist()
        planned.write_shard(shard, Targets.concat([of_row(model, row) for row in corpus.rows(start, stop)]), MADE)


def of_row(model: PreTrainedModel, row: np.ndarray[Any, Any]) -> Targets:
    dense = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].double().log_softmax(dim=-1)
    top = dense.topk(K, dim=-1)
    label = dense[:-1].gather(-1, torch.from_numpy(row[1:].astype(np.int64))[:, None]).squeeze(-1)
    return Targets(
        ids=top.indices.numpy().astype(np.uint32),
        logprobs=top.values.float().numpy(),
        log_tail=torch.log1p(-top.values.exp().sum(dim=-1).clamp(max=1.0)).float().numpy(),
        label_logprob=np.append(label.float().numpy(), np.float32(np.nan)),
    )


if __name__ == "__main__":
    sys.exit(main())
