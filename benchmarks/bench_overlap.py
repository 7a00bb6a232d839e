"""Does writing hide behind scoring? The wall time of a prefill beside that of its scoring alone, at a fixed pace.

The teacher takes its time and costs almost no CPU. Both runs hand it the same rows in the same batches. Exits 1 when a
prefill takes more than 1.05 times the scoring alone, or when a committed shard does not verify.

    python -m benchmarks.bench_overlap [--positions 1048576] [--pace 20000] [--encodings u8,archive]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from benchmarks.support.paced_teacher import PacedTeacher
from potstill.cache import Cache, Fields
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.fill.loop import FillPlan, fill
from potstill.cache.fill.scoring import ScoringWindow
from potstill.cache.row_batches import row_batches, row_starts
from potstill.cache.types import Tokens
from potstill.cache.upkeep.integrity import corrupt_shard_objects
from tests.support.fakes import fake_identity

VOCAB = 49_152
K = 64
ROW_TOKENS = 512
AIM = 1.05
PLAN = FillPlan(batch_tokens=8192, in_flight=2)
ZIPF = 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1 << 20)
    parser.add_argument("--shard-positions", type=int, default=1 << 16)
    parser.add_argument("--pace", type=float, default=20_000.0, help="positions a second (default %(default)s)")
    parser.add_argument("--encodings", default="u8,archive")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.open(Path(folder), mode="r+")
        corpus = make_corpus(cache, args.positions, args.shard_positions)
        teacher = paced(corpus, 0.0)
        cost = asyncio.run(score_alone(teacher, corpus))
        alone = asyncio.run(score_alone(paced(corpus, args.pace), corpus))
        print(
            f"{corpus.num_positions:,} positions in {corpus.num_shards} shards, K={K}, V={VOCAB}\n"
            f"scoring alone at {args.pace:,.0f} positions/s: {alone:.2f} s (its own CPU {cost:.2f} s)",
            flush=True,
        )
        ratios = [prefill(cache, corpus, name, args.pace, alone) for name in args.encodings.split(",")]
    return int(max(ratios) > AIM)


def make_corpus(cache: Cache, positions: int, shard_positions: int) -> Corpus:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    plan = IngestPlan(row_tokens=ROW_TOKENS, shard_positions=shard_positions)
    return ingest_rows(cache.root, "bench", zipf_rows(positions // ROW_TOKENS), tokenizer, plan)


def zipf_rows(count: int) -> Iterator[Tokens]:
    """Rows whose ids are about as uneven as a text's."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield (rng.zipf(ZIPF, ROW_TOKENS) % VOCAB).astype(np.uint32)


def paced(corpus: Corpus, pace: float) -> PacedTeacher:
    identity = fake_identity(vocab_size=VOCAB, tokenizer_sha256=corpus.tokenizer_sha256)
    teacher = PacedTeacher(identity, positions_per_second=pace)
    # Its tables are made at the first row.
    teacher.targets(corpus.row(0), Fields(k=K))
    return teacher


async def score_alone(teacher: PacedTeacher, corpus: Corpus) -> float:
    began = time.monotonic()
    window = ScoringWindow(teacher, Fields(k=K))
    lengths = np.diff(corpus.row_starts).tolist()
    for start, stop in row_batches(row_starts(lengths), PLAN.batch_tokens):
        window.start(corpus.rows(start, stop))
        if len(window) >= PLAN.in_flight:
            await window.oldest()
    while len(window):
        await window.oldest()
    return time.monotonic() - began


def prefill(cache: Cache, corpus: Corpus, encoding: str, pace: float, alone: float) -> float:
    """Ratio of the prefill's wall time to the scoring's."""
    teacher = paced(corpus, pace)
    name = f"teacher-{encoding}"
    targets = cache.plan_targets(name, "bench", teacher.identity, fields=Fields(k=K), encoding=encoding)
    cpu = time.process_time()
    report = asyncio.run(fill(teacher, targets, PLAN))
    cpu = time.process_time() - cpu
    written = cache.targets(name, "bench").sets[0]
    damaged = [line for shard in range(corpus.num_shards) for line in corrupt_shard_objects(written, shard)]
    stored = sum(commit.num_bytes for commit in written.commits.all()) / corpus.num_positions
    ratio = report.seconds / alone
    print(
        f"prefill as {encoding:8s} {report.seconds:6.2f} s, {ratio:.3f} of the scoring alone (aim {AIM}), "
        f"{cpu:.1f} s of CPU, {stored:.1f} bytes/position, {report.positions_scored:,} positions scored",
        flush=True,
    )
    for line in damaged:
        print(f"  WRONG: {line}")
    return ratio if not damaged else float("inf")


if __name__ == "__main__":
    sys.exit(main())
