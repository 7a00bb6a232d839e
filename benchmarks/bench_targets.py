"""SmolLM2's targets: vLLM's against a plain transformers float32 forward, and every encoding against the exact values.

Exits 1 when vLLM is further than 1e-3 nats from transformers on the top-64 of 512 positions, its labels and its
last target included, or when an encoding exceeds its stated bound.

    python benchmarks/bench_targets.py [--positions 8192]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.encoding.logprobs import ENCODINGS
from potstill.cache.entry_points import open_teacher
from potstill.cache.types import Teacher
from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise
from potstill.student_trainer.demo.text import write_text

K = 64
PARITY_POSITIONS = 512
PARITY_BOUND = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192, help="for the encodings")
    args = parser.parse_args()
    model = materialise(default_models_folder())
    with tempfile.TemporaryDirectory() as folder:
        cache, corpus = make_corpus(Path(folder), model, args.positions)
        return asyncio.run(run(cache, corpus, model))


def make_corpus(folder: Path, model: Path, positions: int) -> tuple[Cache, Corpus]:
    tokenizer = load_tokenizer(model)
    write_text(folder / "text", tokenizer, positions)
    cache = Cache.open(folder / "cache", mode="r+")
    plan = IngestPlan(row_tokens=PARITY_POSITIONS, shard_positions=1 << 20)
    return cache, ingest(cache.root, "topics", [folder / "text"], tokenizer, plan)


async def run(cache: Cache, corpus: Corpus, model: Path) -> int:
    async with open_teacher(str(model), options={"dtype": "float32"}) as teacher:
        row = next(i for i in range(len(corpus)) if len(corpus.row(i)) == PARITY_POSITIONS)
        (scored,) = await teacher.score([corpus.row(row)], Fields(k=K))
        far = parity(scored, corpus, row, model)
        exact = Targets.concat(await teacher.score(corpus.rows(0, len(corpus)), Fields(k=K)))
        wide = [report(cache, teacher, name, exact) for name in ENCODINGS]
    return int(far or any(wide))


def parity(scored: Targets, corpus: Corpus, row: int, model: Path) -> bool:
    """Score the row by plain transformers, and tell if vLLM is too far from it."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(corpus.row(row).astype(np.int64))
    with torch.no_grad():
        dense = plain(tokens[None]).logits[0].double().log_softmax(-1).numpy()
    mine = np.take_along_axis(dense, scored.ids.astype(np.int64), axis=1)
    top = np.abs(mine - scored.logprobs)
    labels = dense[np.arange(len(tokens) - 1), tokens[1:]]
    label = np.abs(labels - scored.label_logprob[:-1])
    kept = np.exp(np.sort(dense, axis=1)[:, -K:]).sum(axis=1)
    tail = np.abs((1 - kept) - np.exp(scored.log_tail.astype(np.float64)))
    overlap = np.mean([len(set(a) & set(b)) for a, b in zip(np.argsort(-dense)[:, :K], scored.ids, strict=True)]) / K
    print(f"vLLM against transformers float32, SmolLM2-135M, {len(tokens)} positions, top-{K}:")
    print(f"  max |dlogprob| {top.max():.2e}   mean {top.mean():.2e}   same ids {overlap:.4%}")
    none = bool(np.isnan(scored.label_logprob[-1]))
    print(f"  labels: max |dlogprob| {label.max():.2e} over {len(label)}; the last has none: {none}")
    print(f"  last target: max |dlogprob| {top[-1].max():.2e}   tail mass: max |d| {tail.max():.2e}")
    return bool(max(top.max(), label.max()) > PARITY_BOUND)


def report(cache: Cache, teacher: Teacher, name: str, exact: Targets) -> bool:
    """Store the exact targets, read them back through a new cache, and tell if the encoding exceeds its bound."""
    targets = cache.plan_targets(f"smollm2-{name}", "topics", teacher.identity, fields=Fields(k=K), encoding=name)
    assert targets.write_shard(0, exact, teacher.provenance)
    (commit,) = targets.sets[0].commits.all()
    read = Cache.open(cache.root.url).targets(f"smollm2-{name}", "topics").read(0, exact.num_positions)
    p, q = exact.logprobs.astype(np.float64), read.logprobs.astype(np.float64)
    difference = np.abs(p - q)
    tails = np.exp(exact.log_tail.astype(np.float64)), exact.log_tail - np.maximum(read.log_tail, -100)
    kl = (np.exp(p) * (p - q)).sum(axis=1) + np.where(tails[0] > 0, tails[0] * tails[1], 0)
    parts = {item.path.split("/")[0]: 0 for item in commit.objects}
    for item in commit.objects:
        parts[item.path.split("/")[0]] += item.size
    sizes = ", ".join(f"{part} {size / exact.num_positions:.1f}" for part, size in parts.items() if "/" not in part)
    print(
        f"{name}: {commit.num_bytes / exact.num_positions:.1f} bytes/position ({sizes}) over {exact.num_positions} "
        f"positions; |dlogprob| max {difference.max():.4f} mean {difference.mean():.5f} (bound "
        f"{targets.encoding.max_abs_error}); KL mean {kl.mean():.2e} p99.9 {np.quantile(kl, 0.999):.2e}; saturated "
        f"{commit.error['saturated']:.0f}"
    )
    return bool(difference.max() > targets.encoding.max_abs_error + 1e-6)


if __name__ == "__main__":
    sys.exit(main())
