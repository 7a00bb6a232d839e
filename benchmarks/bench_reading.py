"""Reading a K=64 `u8` cache to float32 arrays on one core, beside Parquet lists and a plain memory map.

    python -m benchmarks.bench_reading [--positions 1048576] [--core 0]

SmolLM2's exact targets and synthetic ones for V = 32k, 128k and 262k, repeated up to the given number of positions,
in rows of 512 tokens. Every figure is the best of several runs in a process of its own, pinned to one core, the
files in the page cache. Seconds are those of the core that the process got, whatever else the machine does: system
calls count, other processes do not. The share of all seconds that it got is printed too; without other work it
is near 100%. Random rows are distinct, 32 a call, without a cache of decoded chunks. Exits 1 when, on SmolLM2, an
aim of issue 3 is missed, the two pipelines give different bytes, or 10 times the corpus costs more per position or
more memory.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.cache import Cache, Fields, Provenance, Targets, TeacherIdentity
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.errors import InvalidInput
from potstill.cache.store.pipelines import codec_pipeline

K = 64
ROW_TOKENS = 512
SHARD_POSITIONS = 1 << 18
SEQUENTIAL_POSITIONS = 1 << 16
ROWS_A_CALL = 32
REPEATS = 3
VOCABULARIES = (32_768, 131_072, 262_144)
SYNTHETIC_POSITIONS = 8192
# Python lists are so slow that fewer positions of them say as much.
LIST_ROWS = 128
LIST_ROW_GROUP = 4
AIMS = {("stock", "sequential"): 400_000, ("stock", "random"): 40_000}
AIMS |= {("zarrs", "sequential"): 1_000_000, ("zarrs", "random"): 200_000}
# What one run differs from the next on a machine that others use too.
NOISE = 1.3
MORE_MEMORY = 64 << 20

Read = Callable[[Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One reader of one folder: `stock`, `zarrs`, `parquet` or `memmap`."""

    reader: str
    folder: Path
    rows: int
    core: int


@dataclass(frozen=True, slots=True)
class Result:
    sequential: float
    random: float
    single: float
    """Positions a second, one random row a call."""
    share: float
    """Share of the time that passed in which a core worked for this process."""
    peak_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    name: str
    vocab_size: int
    tokens: NDArray[np.uint32]
    targets: Targets

    def rows(self, count: int) -> Iterator[tuple[NDArray[np.uint32], Targets]]:
        """`count` rows, from the first on and again."""
        every = self.targets.num_positions // ROW_TOKENS
        for row in range(count):
            start = row % every * ROW_TOKENS
            part = slice(start, start + ROW_TOKENS)
            yield self.tokens[part], self.targets[part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1 << 20)
    parser.add_argument("--core", type=int, default=0)
    args = parser.parse_args()
    print(f"K={K}, u8, {ROW_TOKENS}-token rows, {ROWS_A_CALL} random rows a call, best of {REPEATS}; core {args.core}")
    print(f"{'positions/s':34}{'sequential':>12}{'random':>12}{'one row':>12}{'core':>8}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        failures = run(Path(folder), args.positions, args.core)
    for failure in failures:
        print(f"MISSED: {failure}")
    return int(bool(failures))


def run(folder: Path, positions: int, core: int) -> list[str]:
    rows = max(positions // ROW_TOKENS, 10 * ROWS_A_CALL)
    real = smollm2()
    build(folder / "large", real, rows)
    build(folder / "small", real, rows // 10)
    large = {name: show(real.name, Task(name, folder / "large", rows, core)) for name in pipelines()}
    small = {name: show(f"{real.name}, 1/10", Task(name, folder / "small", rows // 10, core)) for name in pipelines()}
    for name in ("parquet", "memmap"):
        show(real.name, Task(name, folder / "large", LIST_ROWS if name == "parquet" else rows, core))
    shutil.rmtree(folder / "large")
    failures = [*missed_aims(large), *grown(small, large)]
    if len({result.sha256 for result in large.values()}) > 1:
        failures.append("the pipelines give different bytes")
    for vocab_size in VOCABULARIES:
        made = synthetic(vocab_size)
        build(folder / str(vocab_size), made, rows // 4)
        shown = {name: show(made.name, Task(name, folder / str(vocab_size), rows // 4, core)) for name in pipelines()}
        if len({result.sha256 for result in shown.values()}) > 1:
            failures.append(f"the pipelines give different bytes at V={vocab_size}")
        shutil.rmtree(folder / str(vocab_size))
    return failures


def missed_aims(results: dict[str, Result]) -> list[str]:
    return [
        f"{name} {order}: {getattr(results[name], order):,.0f} positions/s, the aim is {aim:,}"
        for (name, order), aim in AIMS.items()
        if name in results and getattr(results[name], order) < aim
    ]


def grown(small: dict[str, Result], large: dict[str, Result]) -> list[str]:
    found = []
    for name, result in large.items():
        # Not rows of one call: in a small corpus more of them share a chunk.
        found += [
            f"{name} {order} costs more per position on 10 times the corpus"
            for order in ("sequential", "single")
            if getattr(small[name], order) > NOISE * getattr(result, order)
        ]
        if result.peak_bytes > small[name].peak_bytes + MORE_MEMORY:
            found.append(f"{name} needs more memory for 10 times the corpus")
    return found


def pipelines() -> list[str]:
    try:
        return ["stock", codec_pipeline("zarrs")]
    except InvalidInput as error:
        print(error)
        return ["stock"]


def show(title: str, task: Task) -> Result:
    """Measure in a new process, so that peak memory is this reader's alone, and print a line."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        result = pool.submit(measure, task).result()
    figures = f"{result.sequential:>12,.0f}{result.random:>12,.0f}{result.single:>12,.0f}"
    print(f"{title:<25}{task.reader:<9}{figures}{result.share:>8.0%}{result.peak_bytes / 2**20:>10,.0f}", flush=True)
    return result


def measure(task: Task) -> Result:
    os.sched_setaffinity(0, {task.core})
    sequential, random, digest = READERS[task.reader](task)
    order = np.random.default_rng(0).permutation(task.rows).tolist()
    calls = [order[at : at + ROWS_A_CALL] for at in range(0, len(order), ROWS_A_CALL)]
    few = order[: max(task.rows // 8, 1)]
    began, worked = time.perf_counter(), time.process_time()
    best_sequential = min(timed(sequential) for _ in range(REPEATS))
    best_random = min(timed(lambda: [random(call) for call in calls]) for _ in range(REPEATS))
    best_single = min(timed(lambda: [random([row]) for row in few]) for _ in range(REPEATS))
    share = (time.process_time() - worked) / (time.perf_counter() - began)
    positions = task.rows * ROW_TOKENS
    return Result(
        positions / best_sequential,
        positions / best_random,
        len(few) * ROW_TOKENS / best_single,
        share,
        peak_bytes(),
        digest(),
    )


def peak_bytes() -> int:
    """Peak memory of this process alone; getrusage would count what its parent held when it started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def cache_reader(task: Task) -> tuple[Callable[[], None], Read, Callable[[], str]]:
    """A cache; random rows without a cache of decoded chunks, everything else as by default."""
    kept = Cache.open(task.folder / "cache", pipeline=task.reader).targets("bench", "bench")
    cold = Cache.open(task.folder / "cache", pipeline=task.reader, chunk_cache_bytes=0).targets("bench", "bench")
    ends = range(0, task.rows * ROW_TOKENS, SEQUENTIAL_POSITIONS)

    def blocks() -> Iterator[Targets]:
        return (kept.read(start, min(start + SEQUENTIAL_POSITIONS, task.rows * ROW_TOKENS)) for start in ends)

    def sequential() -> None:
        for _ in blocks():
            pass

    def random(rows: Sequence[int]) -> None:
        cold.read_rows(rows)

    def digest() -> str:
        sha256 = hashlib.sha256()
        for block in blocks():
            for array in (block.ids, block.logprobs, block.log_tail, block.label_logprob):
                sha256.update(array.tobytes())
        return sha256.hexdigest()

    return sequential, random, digest


def parquet_reader(task: Task) -> tuple[Callable[[], None], Read, Callable[[], str]]:
    """Lists of lists, as a reader of Python rows gets them, and arrays made of those."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(task.folder / "rows.parquet")

    def arrays(rows: list[dict[str, list[list[float]]]]) -> None:
        for row in rows:
            np.array(row["ids"], np.uint32)
            np.array(row["logprobs"], np.float32)

    def sequential() -> None:
        for group in range(file.num_row_groups):
            arrays(file.read_row_group(group).to_pylist())

    def random(rows: Sequence[int]) -> None:
        for row in rows:
            arrays(file.read_row_group(row // LIST_ROW_GROUP).slice(row % LIST_ROW_GROUP, 1).to_pylist())

    return sequential, random, lambda: ""


def memmap_reader(task: Task) -> tuple[Callable[[], None], Read, Callable[[], str]]:
    """Uncompressed float32 and uint32: what decoding costs nothing in, at 516 bytes a position and more."""
    shape = (task.rows * ROW_TOKENS, K)
    files = [
        np.memmap(task.folder / name, dtype, "r", shape=shape) for name, dtype in (("ids", "<u4"), ("logprobs", "<f4"))
    ]

    def read(start: int, stop: int) -> None:
        for file in files:
            np.array(file[start:stop])

    def sequential() -> None:
        for start in range(0, shape[0], SEQUENTIAL_POSITIONS):
            read(start, start + SEQUENTIAL_POSITIONS)

    def random(rows: Sequence[int]) -> None:
        for row in rows:
            read(row * ROW_TOKENS, (row + 1) * ROW_TOKENS)

    return sequential, random, lambda: ""


READERS = {"stock": cache_reader, "zarrs": cache_reader, "parquet": parquet_reader, "memmap": memmap_reader}


def smollm2() -> Sample:
    from benchmarks.support.smollm2_exact import load

    exact = load()
    return Sample("SmolLM2 V=49,152", exact.vocab_size, exact.tokens, top_k(exact.targets))


def synthetic(vocab_size: int) -> Sample:
    from benchmarks.support.synthetic_targets import load

    made = load(vocab_size, SYNTHETIC_POSITIONS)
    return Sample(made.name, vocab_size, made.tokens, top_k(made.targets))


def top_k(targets: Targets) -> Targets:
    """The top 64 alone."""
    kept = targets.prefix(K)
    return Targets(ids=kept.ids, logprobs=kept.logprobs, log_tail=kept.log_tail, label_logprob=kept.label_logprob)


def build(folder: Path, sample: Sample, rows: int) -> None:
    """A cache of `rows` rows, and beside it the same targets as Parquet (the first ones) and as plain files."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(sample.vocab_size)}, unk_token="0"))
    cache = Cache.open(folder / "cache", mode="r+")
    plan = IngestPlan(row_tokens=ROW_TOKENS, shard_positions=SHARD_POSITIONS)
    corpus = ingest_rows(cache.root, "bench", (tokens for tokens, _ in sample.rows(rows)), tokenizer, plan)
    identity = TeacherIdentity(
        model=sample.name,
        revision="1",
        weights_sha256="0" * 64,
        tokenizer_sha256=corpus.tokenizer_sha256,
        vocab_size=sample.vocab_size,
        dtype="float32",
        head_dtype="float32",
    )
    targets = cache.plan_targets("bench", "bench", identity, fields=Fields(k=K), encoding="u8")
    every = [row for _, row in sample.rows(rows)]
    targets.make_ranks(Targets.concat([every[row] for row in targets.pilot_rows()]))
    made = Provenance(engine="benchmark", engine_version="1", device="none", capture_path="none")
    starts = corpus.shard_rows.tolist()
    for shard, (first, last) in enumerate(pairwise(starts)):
        assert targets.write_shard(shard, Targets.concat(every[first:last]), made), "there is no other writer"
    write_plain(folder, every)
    write_lists(folder / "rows.parquet", every[:LIST_ROWS])


def write_plain(folder: Path, rows: Sequence[Targets]) -> None:
    with (folder / "ids").open("wb") as ids, (folder / "logprobs").open("wb") as logprobs:
        for row in rows:
            ids.write(row.ids.astype("<u4").tobytes())
            logprobs.write(row.logprobs.astype("<f4").tobytes())


def write_lists(path: Path, rows: Sequence[Targets]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"ids": [row.ids.tolist() for row in rows], "logprobs": [row.logprobs.tolist() for row in rows]}
    types = {"ids": pa.list_(pa.list_(pa.uint32())), "logprobs": pa.list_(pa.list_(pa.float32()))}
    table = pa.table({name: pa.array(column, types[name]) for name, column in columns.items()})
    pq.write_table(table, path, compression="zstd", row_group_size=LIST_ROW_GROUP)


if __name__ == "__main__":
    sys.exit(main())
