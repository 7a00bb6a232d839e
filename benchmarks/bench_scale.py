"""Many rows and many segments: what opening, looking up and reading cost when a cache is large.

A synthetic corpus of short rows and a target set with a segment for every few hundred of them are made once (they are
not flushed to disk, which is not what is measured) and measured in fresh processes. What is in the folder already is
used, also after a stop; without `--folder` it is a temporary one.

    python -m benchmarks.bench_scale [--folder DIR] [--rows 10000000] [--segments 20000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from potstill.cache import Cache, Fields, Provenance, Targets, TeacherIdentity
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, IngestProgress, ingest_rows
from potstill.cache.corpus.writing import MOST_SHARD_POSITIONS
from potstill.cache.store.groups import Reading
from potstill.cache.store.root import Root
from potstill.cache.targets.target_set import TargetSet

VOCAB = 32_000
K = 4
SHORTEST, LONGEST = 4, 12
CORPUS, TEACHER = "rows", "synthetic"
BLOCK_ROWS = 100_000
PROCESSES = 2
SHARDS_AT_ONCE = 200
SINGLE = 1000
BATCH = 1000
BATCHES = 20
ROWS_READ = 300
BILLION = 10**9


class UnflushedRoot(Root):
    """Leaves it to the kernel when bytes reach the disk."""

    def flush(self, prefix: str) -> None:
        pass

    def create(self, path: str, data: bytes, **_: Any) -> bool:
        return super().create(path, data, durable=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the cache, which is kept: about 150 bytes a row")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--segments", type=int, default=20_000)
    parser.add_argument("--stage", choices=STAGES, help="run one stage here, in --folder; prints JSON")
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.folder, args.rows, args.segments)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        run_stages((args.folder or Path(temporary)) / f"scale-{args.rows}-{args.segments}", args.rows, args.segments)
    return 0


def run_stages(folder: Path, rows: int, segments: int) -> None:
    """Each in a process of its own."""
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.bench_scale", "--folder", str(folder), "--stage", stage]
        command += ["--rows", str(rows), "--segments", str(segments)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"\n{stage}", flush=True)
        for name, value in json.loads(answer.stdout.splitlines()[-1]).items():
            print(f"  {name:58}  {value:>16,.{0 if isinstance(value, int) else 3}f}", flush=True)


def make_corpus(folder: Path, rows: int, segments: int) -> dict[str, float]:
    cache = Cache.open(folder, mode="r+")
    if CORPUS in cache.corpora():
        return {"rows that were there": len(cache.corpus(CORPUS))}
    positions = rows * (SHORTEST + LONGEST) // 2
    plan = IngestPlan(row_tokens=LONGEST, shard_positions=positions // segments + LONGEST // 2)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    before = time.perf_counter()

    def on_progress(at: IngestProgress) -> None:
        print(f"\r{at.tokens:,} of about {positions:,} positions", end="", file=sys.stderr)

    corpus = ingest_rows(cache.root, CORPUS, synthetic_rows(rows), tokenizer, plan, on_progress=on_progress)
    seconds = time.perf_counter() - before
    return {
        "rows": len(corpus),
        "positions": corpus.num_positions,
        "shards": corpus.num_shards,
        "seconds": seconds,
        "rows/s": len(corpus) / seconds,
        "peak memory, MiB": peak_mib(),
    }


def make_targets(folder: Path, _rows: int, _segments: int) -> dict[str, float]:
    targets = open_targets(folder)
    missing = np.flatnonzero(~targets.committed).tolist()
    before = time.perf_counter()
    if missing:
        write_shards(folder, missing[:1])
        parts = [missing[i : i + SHARDS_AT_ONCE] for i in range(1, len(missing), SHARDS_AT_ONCE)]
        with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
            for done, _ in enumerate(pool.map(partial(write_shards, folder), parts), start=1):
                print(f"\r{done:,} of {len(parts):,} parts of the segments", end="", file=sys.stderr)
    wrote = time.perf_counter()
    targets.fold()
    folded = time.perf_counter()
    return {
        "segments written now": len(missing),
        f"segments/s of {PROCESSES} processes, K={K}": len(missing) / (wrote - before),
        "seconds to fold the commits": folded - wrote,
    }


def measure(folder: Path, _rows: int, _segments: int) -> dict[str, float]:
    """Times of a fresh process, by the fastest pipeline that is installed."""
    found: dict[str, float] = {"memory after imports, MiB": rss_mib()}
    before = time.perf_counter()
    cache = Cache.open(folder)
    corpus = cache.corpus(CORPUS)
    found["seconds to open cache and corpus"] = time.perf_counter() - before
    before = time.perf_counter()
    targets = cache.targets(TEACHER, CORPUS)
    committed = int(targets.committed.sum())
    found["seconds to open the target set and see what is committed"] = time.perf_counter() - before
    assert committed == corpus.num_shards, "run the stage before"
    before = time.perf_counter()
    targets.read_rows([len(corpus) // 2])
    found["seconds to the first row's targets"] = time.perf_counter() - before
    found["memory then, MiB"] = rss_mib()
    found |= lookups(folder, corpus)
    rows = np.random.default_rng(1).integers(0, len(corpus), ROWS_READ).tolist()
    found["rows/s of targets, random, one by one"] = rate(ROWS_READ, lambda: [targets.read_rows([row]) for row in rows])
    found["rows/s of targets, random, 300 at once, again"] = rate(ROWS_READ, lambda: targets.read_rows(rows))
    found["memory at the end, MiB"] = rss_mib()
    return found


def lookups(folder: Path, corpus: Corpus) -> dict[str, float]:
    """Lookups a second of keys that are there and that are not, each from an empty chunk cache."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(corpus), SINGLE + BATCH * BATCHES)
    hits = [corpus.key(corpus.row(int(row))) for row in rows]
    misses = [rng.bytes(16) for _ in hits]
    assert all(found is not None and found <= row for found, row in zip(corpus.find(hits), rows, strict=True))
    assert not any(found is not None for found in corpus.find(misses))
    answer: dict[str, float] = {}
    for kind, keys in (("hits", hits), ("misses", misses)):
        single, batches = keys[:SINGLE], [keys[i : i + BATCH] for i in range(SINGLE, len(keys), BATCH)]
        fresh = [Cache.open(folder).corpus(CORPUS) for _ in range(2)]
        answer[f"lookups/s, {kind}, one by one"] = rate(SINGLE, partial(find_each, fresh[0], single))
        answer[f"lookups/s, {kind}, {BATCH} at once"] = rate(BATCH * BATCHES, partial(find_batches, fresh[1], batches))
    return answer


def count_requests(folder: Path, _rows: int, _segments: int) -> dict[str, float]:
    """Calls of the store by the stock pipeline, which asks for every byte through it."""
    calls = counted_calls()
    cache = Cache.open(folder, pipeline="stock")
    corpus = Corpus.open(cache.root, CORPUS, Reading.open(pipeline="stock"))
    targets = cache.targets(TEACHER, CORPUS)
    targets.committed.sum()
    found: dict[str, float] = {"store calls to open corpus and target set": calls.total()}
    rng = np.random.default_rng(2)
    rows = rng.integers(0, len(corpus), 200).tolist()
    keys = [corpus.key(corpus.row(row)) for row in rows]
    for what, act in (
        ("per lookup, one by one", lambda: find_each(corpus, keys)),
        ("per row of targets in segments not opened before", lambda: [targets.read_rows([row]) for row in rows]),
        ("per row of targets in opened segments", lambda: [targets.read_rows([row ^ 1]) for row in rows]),
    ):
        before = calls.total()
        act()
        found[f"store calls {what}"] = (calls.total() - before) / len(rows)
    return found


def count_objects(folder: Path, _rows: int, _segments: int) -> dict[str, float]:
    cache = Cache.open(folder)
    corpus, targets = cache.corpus(CORPUS), cache.targets(TEACHER, CORPUS)
    (segments,) = targets.sets
    commit = segments.commits.of(0)
    assert commit is not None
    of_corpus, of_segment = len(corpus.spec.objects) + 1, len(commit.objects) + 1
    everything = of_corpus + of_segment * corpus.num_shards
    found: dict[str, float] = {
        "objects of the corpus": of_corpus,
        "objects of a segment and its commit": of_segment,
        "objects per billion positions, these short shards": round(everything * BILLION / corpus.num_positions),
    }
    for positions in (MOST_SHARD_POSITIONS, 8 << 20):
        name = f"objects per billion positions, shards of {positions:,}"
        found[name] = of_corpus + of_segment * -(-BILLION // positions)
    return found


STAGES: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    "make-corpus": make_corpus,
    "make-targets": make_targets,
    "measure": measure,
    "requests": count_requests,
    "objects": count_objects,
}


def synthetic_rows(count: int) -> Iterator[NDArray[np.uint32]]:
    for block, start in enumerate(range(0, count, BLOCK_ROWS)):
        rng = np.random.default_rng(block)
        ends = np.cumsum(rng.integers(SHORTEST, LONGEST + 1, min(BLOCK_ROWS, count - start)))
        tokens = rng.integers(0, VOCAB, int(ends[-1]), dtype=np.uint32)
        first = 0
        for end in ends.tolist():
            yield tokens[first:end]
            first = end


def shard_targets(corpus: Corpus, shard: int) -> Targets:
    first, last = (int(row) for row in corpus.shard_rows[shard : shard + 2])
    starts = corpus.starts(first, last)
    num_positions = int(starts[-1] - starts[0])
    rng = np.random.default_rng(shard)
    ids = np.argsort(rng.random((num_positions, 16)), axis=1)[:, :K].astype(np.uint32)
    logprobs = -np.cumsum(rng.random((num_positions, K)) + 0.9, axis=1)
    label = np.full(num_positions, -3.0, dtype=np.float32)
    label[starts[1:] - starts[0] - 1] = np.nan
    return Targets(
        ids=ids,
        logprobs=logprobs.astype(np.float32),
        log_tail=np.log1p(-np.exp(logprobs).sum(axis=1)).astype(np.float32),
        label_logprob=label,
    )


def open_targets(folder: Path) -> TargetSet:
    cache = Cache.open(folder, mode="r+")
    cache.root = UnflushedRoot.open(folder)
    teacher = identity(cache.corpus(CORPUS))
    return cache.plan_targets(TEACHER, CORPUS, teacher, fields=Fields(k=K), encoding="u8")


def write_shards(folder: Path, shards: list[int]) -> None:
    targets = open_targets(folder)
    for shard in shards:
        targets.write_shard(shard, shard_targets(targets.corpus, shard), provenance())


def identity(corpus: Corpus) -> TeacherIdentity:
    return TeacherIdentity(
        model="synthetic",
        revision="1",
        weights_sha256="0" * 64,
        tokenizer_sha256=corpus.tokenizer_sha256,
        vocab_size=VOCAB,
        dtype="float32",
        head_dtype="float32",
    )


def provenance() -> Provenance:
    return Provenance(engine="none", engine_version="1", device="none", capture_path="synthetic")


def find_each(corpus: Corpus, keys: list[bytes]) -> None:
    for key in keys:
        corpus.find([key])


def find_batches(corpus: Corpus, batches: list[list[bytes]]) -> None:
    for batch in batches:
        corpus.find(batch)


def rate(count: int, act: Callable[[], Any]) -> float:
    before = time.perf_counter()
    act()
    return count / (time.perf_counter() - before)


def counted_calls() -> Counter[str]:
    """Counts, from now on, what this process asks of obstore."""
    import obstore

    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    kinds = ("get", "get_range", "get_ranges", "head", "list_with_delimiter")
    for name in ("list", *kinds, *(f"{kind}_async" for kind in kinds)):
        setattr(obstore, name, counted(name, getattr(obstore, name)))
    return calls


def rss_mib() -> float:
    """Resident memory now; the peak where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mib()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
