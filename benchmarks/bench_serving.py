"""Positions a second and bytes on the wire of the process that `potstill serve` starts, beside servers of others.

    python -m benchmarks.bench_serving [--only ranges,files,rows,hits,json,misses,vllm] [--k 64] [--seconds 10]

From the cache:
    ranges   blocks of positions of a corpus, through HttpTargets
    files    beside it: the same blocks as raw arrays, by Range requests to Starlette's static files
    rows     random rows of the corpus, 32 a request, through HttpTargets: what a trainer does
    hits     the same rows by their tokens, through HttpTeacher: the cache finds them by key
    json     the same rows by their tokens, as JSON with plain httpx
Computed, by one tiny model:
    misses   rows by their tokens, through HttpTeacher, with nothing kept
    vllm     beside it: the same rows, as vLLM's own OpenAI server answers them with prompt_logprobs=K

Each part runs alone, with a server process of its own on loopback and `--clients` client threads in this process. The
cached targets are those of a made-up teacher, kept as u8: what is on the wire is the same for any. The first answers
(imports, compiling, opening files) are not counted. Positions per second of the server's own processor time say what
one core would give where clients run elsewhere. Bytes are of answers' bodies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from potstill.cache import Cache, Fields, Targets
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.types import Tokens
from potstill.cache.wire import scores as wire
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import SyncHttpTeacher
from tests.support.corpora import VOCAB, byte_tokenizer, teacher_for
from tests.support.processes.vllm_server import free_port, potstill_serving, process_serving, vllm_serving

PARTS = ("ranges", "files", "rows", "hits", "json", "misses", "vllm")
ROW_TOKENS = 200
ROWS_A_REQUEST = 32
RANGE_POSITIONS = 1 << 16
SCORED_ROWS = 64
TARGETS = "/v1/corpora/docs/targets/fake"
WIDTHS = (12, 16, 16, 12, 12)


@dataclass(frozen=True, slots=True)
class Figure:
    """Measures of one part."""

    part: str
    positions: int
    seconds: float
    server_seconds: float
    client_seconds: float
    num_bytes: int

    def line(self) -> str:
        rate, server = self.positions / self.seconds, self.positions / max(self.server_seconds, 1e-9)
        client = self.positions / max(self.client_seconds, 1e-9)
        cells = (rate, server, client, self.num_bytes / max(self.positions, 1), self.positions)
        return f"{self.part:<8} " + " ".join(f"{cell:>{width},.0f}" for cell, width in zip(cells, WIDTHS, strict=True))


Work = Callable[[int], tuple[int, int]]
"""One request of a client thread, by its number: the positions it got, and their bytes on the wire."""


def make_cache(root: Path, k: int, positions: int) -> Corpus:
    """Rows of 200 tokens; the targets of the first are exact, and repeated for the others."""
    rng = np.random.default_rng(0)
    cache = Cache.open(root, "r+")
    rows = [rng.integers(1, 256, ROW_TOKENS).astype(np.uint32) for _ in range(positions // ROW_TOKENS)]
    plan = IngestPlan(row_tokens=ROW_TOKENS, shard_positions=1 << 18)
    corpus = ingest_rows(cache.root, "docs", rows, byte_tokenizer(), plan)
    teacher = teacher_for(corpus)
    targets = cache.plan_targets("fake", "docs", teacher.identity, fields=Fields(k=k), encoding="u8")
    some = Targets.concat([teacher.targets(row, Fields(k=k)) for row in rows[:SCORED_ROWS]])
    targets.make_ranks(some)
    for shard, count in enumerate(np.diff(corpus.shard_starts).tolist()):
        repeated = Targets.concat([some] * (-(-count // some.num_positions)))[:count]
        assert targets.write_shard(shard, repeated, teacher.provenance)
    return corpus


@contextmanager
def service(root: Path) -> Iterator[str]:
    """`potstill serve` with the cache, and a fake teacher of the identity that scored it."""
    port = free_port()
    served = Path(__file__).parent / "abuse" / "served.py"
    options = ["--teacher", f"fake=fake://{VOCAB}", "--cache", str(root), "--port", str(port)]
    command = [sys.executable, "-P", str(served), *options]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with process_serving(command, f"http://127.0.0.1:{port}", root.parent / "service.log", environment) as url:
        yield url


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Starlette's static files in a uvicorn of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.bench_serving", "--files", str(folder), "--port", str(port)]
    with process_serving(command, f"http://127.0.0.1:{port}", folder.parent / "files.log", {}) as url:
        yield url


def serve_files(folder: str, port: int) -> None:
    """Serve a folder, until killed."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.staticfiles import StaticFiles

    app = Starlette()
    app.mount("/", StaticFiles(directory=folder))
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, ws="none")


def measure(part: str, work: Work, *, seconds: float, clients: int) -> Figure:
    """Have the clients work until the time is over, after one request each that is not counted."""
    server = child()
    counter, lock = itertools.count(), threading.Lock()
    stop = 0.0
    totals = np.zeros(2, np.int64)

    def client() -> None:
        while time.perf_counter() < stop:
            done = work(next(counter))
            with lock:
                totals[:] += done

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
        before, mine = processor_seconds(server), time.process_time()
        begin = time.perf_counter()
        stop = begin + seconds
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
        took = time.perf_counter() - begin
    used = processor_seconds(server) - before
    return Figure(part, int(totals[0]), took, used, time.process_time() - mine, int(totals[1]))


def child() -> psutil.Process:
    (only,) = psutil.Process().children()
    return only


def processor_seconds(process: psutil.Process) -> float:
    """Seconds of CPU time of a process and all that it started."""
    return sum(
        sum(times.cpu_times()[:2]) for times in [process, *process.children(recursive=True)] if times.is_running()
    )


def measure_ranges(root: Path, args: argparse.Namespace) -> Figure:
    with service(root) as url, HttpCache(url) as cache:
        whole = {"start": 0, "stop": RANGE_POSITIONS}
        size = body_bytes(httpx.get(f"{url}{TARGETS}", params=whole, timeout=60), RANGE_POSITIONS)
        targets = cache.targets("fake", "docs")
        most = targets.corpus.num_positions - RANGE_POSITIONS

        def work(number: int) -> tuple[int, int]:
            start = number * RANGE_POSITIONS % max(most, 1)
            got = sum(part.num_positions for part in targets.stream(start, start + RANGE_POSITIONS))
            return got, round(got * size)

        return measure("ranges", work, seconds=args.seconds, clients=args.clients)


def measure_files(root: Path, args: argparse.Namespace) -> Figure:
    """Ranges as raw arrays of ids and logprobs that a plain file server gives."""
    position = np.dtype([("ids", "<u4", args.k), ("logprobs", "<f4", args.k), ("tail", "<f4"), ("label", "<f4")])
    folder = root.parent / "files"
    folder.mkdir()
    np.zeros(args.positions, position).tofile(folder / "targets")
    (folder / "health").write_text("ok")
    with file_server(folder) as url, httpx.Client(timeout=600.0) as http:

        def work(number: int) -> tuple[int, int]:
            start = number * RANGE_POSITIONS % max(args.positions - RANGE_POSITIONS, 1) * position.itemsize
            ask = {"range": f"bytes={start}-{start + RANGE_POSITIONS * position.itemsize - 1}"}
            reply = http.get(f"{url}/targets", headers=ask).raise_for_status()
            return len(np.frombuffer(reply.content, position)), len(reply.content)

        return measure("files", work, seconds=args.seconds, clients=args.clients)


def measure_rows(root: Path, args: argparse.Namespace) -> Figure:
    with service(root) as url, HttpCache(url) as cache:
        some = list(range(ROWS_A_REQUEST))
        size = body_bytes(httpx.post(f"{url}{TARGETS}/rows", json={"rows": some}, timeout=60), len(some) * ROW_TOKENS)
        targets = cache.targets("fake", "docs")
        num_rows = len(targets.corpus)

        def work(number: int) -> tuple[int, int]:
            rows = np.random.default_rng(number).integers(0, num_rows, ROWS_A_REQUEST).tolist()
            got = sum(part.num_positions for part in targets.read_rows(rows))
            return got, round(got * size)

        return measure("rows", work, seconds=args.seconds, clients=args.clients)


def measure_hits(root: Path, args: argparse.Namespace) -> Figure:
    rows = scored_rows(root)
    question = wire.request_to_arrow(wire.ScoreRequest(part_of(rows, 0), Fields(k=args.k)))
    arrow = {"content-type": wire.ARROW_MEDIA_TYPE}
    with service(root) as url, SyncHttpTeacher(url, "fake") as teacher:
        reply = httpx.post(f"{url}/v1/teachers/fake/score", content=question, headers=arrow, timeout=60)
        size = body_bytes(reply, ROWS_A_REQUEST * ROW_TOKENS)

        def work(number: int) -> tuple[int, int]:
            got = sum(part.num_positions for part in teacher.score(part_of(rows, number), Fields(k=args.k)))
            return got, round(got * size)

        return measure("hits", work, seconds=args.seconds, clients=args.clients)


def measure_json(root: Path, args: argparse.Namespace) -> Figure:
    rows = scored_rows(root)
    with service(root) as url, httpx.Client(timeout=600.0) as http:

        def work(number: int) -> tuple[int, int]:
            body = {"rows": [row.tolist() for row in part_of(rows, number)], "fields": {"k": args.k}}
            reply = http.post(f"{url}/v1/teachers/fake/score", json=body).raise_for_status()
            return ROWS_A_REQUEST * ROW_TOKENS, len(reply.content)

        return measure("json", work, seconds=args.seconds, clients=args.clients)


def measure_misses(root: Path, args: argparse.Namespace) -> Figure:
    """Rows that are computed by the engine that `vllm` measures, with nothing kept."""
    from tests.support.tiny_models import make_tiny_llama

    rows = scored_rows(root)
    model = make_tiny_llama(root.parent / "model")
    with potstill_serving(model) as url, SyncHttpTeacher(url, "tiny") as teacher:
        question = wire.request_to_arrow(wire.ScoreRequest(part_of(rows, 0), Fields(k=args.k)))
        arrow = {"content-type": wire.ARROW_MEDIA_TYPE}
        reply = httpx.post(f"{url}/v1/teachers/tiny/score", content=question, headers=arrow, timeout=600)
        size = body_bytes(reply, ROWS_A_REQUEST * ROW_TOKENS)

        def work(number: int) -> tuple[int, int]:
            got = sum(part.num_positions for part in teacher.score(part_of(rows, number), Fields(k=args.k)))
            return got, round(got * size)

        return measure("misses", work, seconds=args.seconds, clients=args.clients)


def measure_vllm(root: Path, args: argparse.Namespace) -> Figure:
    from tests.support.tiny_models import make_tiny_llama

    rows = scored_rows(root)
    model = make_tiny_llama(root.parent / "model")
    with vllm_serving(model, max_logprobs=args.k) as url, httpx.Client(timeout=600.0) as http:

        def work(number: int) -> tuple[int, int]:
            prompt = [row.tolist() for row in part_of(rows, number)[:8]]
            body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            reply = http.post(f"{url}/v1/completions", json={**body, "prompt_logprobs": args.k}).raise_for_status()
            return len(prompt) * ROW_TOKENS, len(reply.content)

        return measure("vllm", work, seconds=args.seconds, clients=args.clients)


def scored_rows(root: Path) -> list[Tokens]:
    return Cache.open(root).corpus("docs").rows(0, SCORED_ROWS)


def part_of(rows: Sequence[Tokens], number: int) -> list[Tokens]:
    start = number * ROWS_A_REQUEST % len(rows)
    return [rows[(start + i) % len(rows)] for i in range(ROWS_A_REQUEST)]


def body_bytes(reply: httpx.Response, positions: int) -> float:
    """Bytes of a reply's body for each position."""
    return len(reply.raise_for_status().content) / positions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--positions", type=int, default=1 << 20)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.files:
        serve_files(args.files, args.port)
        return 0
    parts = args.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    runs = {"ranges": measure_ranges, "files": measure_files, "rows": measure_rows, "hits": measure_hits}
    runs |= {"json": measure_json, "misses": measure_misses, "vllm": measure_vllm}
    figures = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "cache"
        make_cache(root, args.k, args.positions)
        for part in parts:
            figures.append(runs[part](root, args))
            print(json.dumps(asdict(figures[-1])), flush=True)
    headings = ("positions/s", "per server core", "per client core", "bytes/pos.", "measured")
    print(f"\n{'part':<8} " + " ".join(f"{head:>{width}}" for head, width in zip(headings, WIDTHS, strict=True)))
    for figure in figures:
        print(figure.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
