"""The student's stream: padding of real text, and waiting of a paced consumer for a store that takes 50 ms a call.

    python -m benchmarks.student.bench_stream [--seconds 20] [--rate 200000] [--readers 8] [--ahead 64]

Padding: the help topics of the standard library by SmolLM2's tokenizer, in rows of 512 and 2,048 tokens, steps of 64
rows, micro-batches of 8; in the order of the rows, in rows of similar length, and packed.

Waiting: synthetic targets (V = 32,768, K = 64, `u8`) in rows of 512, shards of 262,144 positions and windows of two,
read as from an object store (a folder by obstore, 50 ms before each object, and before each ten ranges of one, which is
how many obstore reads at a time). The consumer sleeps for each micro-batch as long as a student of `--rate` positions a
second would compute. Every 20 steps it evaluates on 64 rows.
Reported: seconds waited of all seconds, after the first evaluation and the first `--ahead` micro-batches, by the clock
of the consumer; beside it the part in which what it asked for was not there, which runs report as theirs. The rest
is Python's lock. The CPU seconds that reading took are those of the whole process.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from obstore.store import LocalStore

from benchmarks.support import synthetic_targets
from benchmarks.support.synthetic_targets import ROW_TOKENS
from potstill.cache import Cache, Fields, Provenance, Targets, TeacherIdentity
from potstill.cache.corpus.ingest import IngestPlan, ingest, ingest_rows
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.store import Reading, Root
from potstill.student_trainer.data import Batch, BatchReader
from potstill.student_trainer.data.mixture import MixtureOrder
from potstill.student_trainer.data.order import SampleOrder
from potstill.student_trainer.data.packing import num_slots, plan_micro_batches
from potstill.student_trainer.data.repeated import RepeatedBatches
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.data.steps import Part, read_steps
from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise
from potstill.student_trainer.demo.text import write_text

BATCH_ROWS, MICRO_BATCH_ROWS, EVALUATION_ROWS, EVALUATE_EVERY = 64, 8, 64, 20
CALL_SECONDS = 0.05
K = 64
SHARD_POSITIONS, WINDOW_SHARDS = 1 << 18, 2
MOST_PADDING = MOST_WAITING = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=200_000.0, help="positions a second of the consumer")
    parser.add_argument("--readers", type=int, default=8, help="as data.readers")
    parser.add_argument("--ahead", type=int, default=64, help="as data.prefetch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = [show_padding(Path(folder) / str(tokens), tokens) for tokens in (512, 2048)]
        rows = int(args.seconds * args.rate / ROW_TOKENS) + EVALUATION_ROWS
        build(Path(folder) / "stream", rows)
        good.append(show_waiting(Path(folder) / "stream", args.rate, args.readers, args.ahead))
    return int(not all(good))


def show_padding(folder: Path, row_tokens: int) -> bool:
    tokenizer = load_tokenizer(materialise(default_models_folder()))
    write_text(folder / "text", tokenizer, 1 << 20)
    cache = Cache.open(folder / "cache", mode="r+")
    corpus = ingest(cache.root, "topics", [folder / "text"], tokenizer, IngestPlan(row_tokens=row_tokens))
    order = SampleOrder(corpus.shard_rows, np.zeros(0, np.int64), seed=0)
    lengths = np.diff(corpus.row_starts)
    steps = [lengths[order.take(start, BATCH_ROWS)] for start in range(0, len(corpus), BATCH_ROWS)]
    real = sum(int(step.sum()) for step in steps)
    in_order = [step[at : at + MICRO_BATCH_ROWS] for step in steps for at in range(0, BATCH_ROWS, MICRO_BATCH_ROWS)]
    slots = {"in order": sum(len(part) * int(part.max()) for part in in_order)}
    for name, pack in (("similar lengths", False), ("packed", True)):
        plans = [plan_micro_batches([step], MICRO_BATCH_ROWS, row_tokens, pack=pack)[0] for step in steps]
        slots[name] = sum(num_slots(plan, step) for plan, step in zip(plans, steps, strict=True))
    shares = {name: 1 - real / count for name, count in slots.items()}
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"padding, {len(corpus):,} rows of up to {row_tokens} tokens, mean {lengths.mean():.0f}: {told}")
    return shares["packed"] < MOST_PADDING


def build(folder: Path, rows: int) -> None:
    """A cache of `rows` rows of 512 positions: 32 synthetic ones, again and again."""
    from tokenizers import Tokenizer, models

    sample = synthetic_targets.load(32_768, 32 * ROW_TOKENS)
    every = [slice(start, start + ROW_TOKENS) for start in range(0, 32 * ROW_TOKENS, ROW_TOKENS)]
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(sample.vocab_size)}, unk_token="0"))
    cache = Cache.open(folder, mode="r+")
    tokens = (sample.tokens[every[row % 32]] for row in range(rows))
    corpus = ingest_rows(
        cache.root, "bench", tokens, tokenizer, IngestPlan(row_tokens=ROW_TOKENS, shard_positions=SHARD_POSITIONS)
    )
    identity = TeacherIdentity(
        model="made up",
        revision="1",
        weights_sha256="0" * 64,
        tokenizer_sha256=corpus.tokenizer_sha256,
        vocab_size=sample.vocab_size,
        dtype="float32",
        head_dtype="float32",
    )
    targets = cache.plan_targets("bench", "bench", identity, fields=Fields(k=K), encoding="u8")
    parts = [sample.targets[part].prefix(K) for part in every]
    targets.make_ranks(Targets.concat(parts))
    made = Provenance(engine="benchmark", engine_version="1", device="none", capture_path="none")
    starts = corpus.shard_rows.tolist()
    for shard, (first, last) in enumerate(pairwise(starts)):
        targets.write_shard(shard, Targets.concat([parts[row % 32] for row in range(first, last)]), made)


class SlowStore(LocalStore):
    """A folder by obstore, whose every object, and every ten ranges of one, come after `CALL_SECONDS`."""

    __module__ = "obstore.store"  # by which zarr knows one

    def get(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(CALL_SECONDS)
        return super().get(*args, **kwargs)

    def get_ranges(self, path: str, *, starts: Sequence[int], **kwargs: Any) -> Any:
        time.sleep(CALL_SECONDS * -(-len(starts) // 10))
        return super().get_ranges(path, starts=starts, **kwargs)

    async def get_async(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(CALL_SECONDS)
        return await super().get_async(*args, **kwargs)


def show_waiting(folder: Path, rate: float, readers: int, ahead: int) -> bool:
    cache = Cache(Root("slow", SlowStore(folder), None), "r", Reading.open(128 << 20))
    corpus = cache.corpus("bench")
    source = cache_source("bench", cache.targets("bench", "bench"))
    reader = BatchReader(corpus, (source,), (1.0,))
    held_out = np.arange(len(corpus) - EVALUATION_ROWS, len(corpus))
    order = SampleOrder(corpus.shard_rows, held_out, seed=0, window_shards=WINDOW_SHARDS)
    orders = MixtureOrder((order,), np.array([0, len(corpus)]), (((0, 1.0),),), BATCH_ROWS, 0)
    part = Part(rank=0, world_size=1, micro_batch_rows=MICRO_BATCH_ROWS, pack=True)
    steps = range(order.rows_per_epoch // BATCH_ROWS)
    held = RepeatedBatches(reader, held_out, MICRO_BATCH_ROWS, pack=True, readers=readers)
    consumer = Consumer(rate)
    stream = read_steps(reader, orders, steps, part, readers=readers, ahead=ahead, pin=False)
    with stream.until_closed() as batches:
        with held.read() as evaluated:  # as a run does before its first step
            consumer.take(evaluated)
        consumer.take(each.batch for each in islice(batches, ahead))
        consumer.waited, consumer.positions, before = 0.0, 0, stream.waited
        began, cpu = time.monotonic(), time.process_time()
        evaluations = (len(steps) - 1 - ahead * MICRO_BATCH_ROWS // BATCH_ROWS) // EVALUATE_EVERY
        for _ in range(evaluations):
            consumer.take(each.batch for each in islice(batches, EVALUATE_EVERY * BATCH_ROWS // MICRO_BATCH_ROWS))
            with held.read() as evaluated:
                consumer.take(evaluated)
    seconds = time.monotonic() - began
    share, windows = consumer.waited / seconds, corpus.num_shards / order.window_shards
    print(
        f"waiting for a store of {CALL_SECONDS * 1000:.0f} ms a call: {share:.1%} of {seconds:.0f} s "
        f"({(stream.waited - before) / seconds:.2%} for steps that were not there) at "
        f"{consumer.positions / seconds:,.0f} positions/s; {corpus.num_shards} shards in {windows:.1f} windows, "
        f"{evaluations} evaluations, {readers} readers, {ahead} ahead, {(time.process_time() - cpu) / seconds:.2f} CPUs"
    )
    return share < MOST_WAITING


class Consumer:
    """Takes a batch, and sleeps as long as a student of a given speed would compute."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.waited = 0.0
        self.positions = 0

    def take(self, batches: Iterator[Batch]) -> None:
        began = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - began
            self.positions += batch.num_positions
            time.sleep(batch.num_positions / self.rate)
            began = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
