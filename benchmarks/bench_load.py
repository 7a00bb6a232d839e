"""Many clients on one service for minutes, while its replicas are killed and scaled.

`potstill serve` runs a tiny Llama on Ray with two vLLM replicas, in a process of its own, over a cache that holds a
filled corpus. Clients score rows of that corpus (hits) and rows that nobody asked for before (misses) without retries
of their own, so that every refusal is seen; a refused client waits as long as `Retry-After` says. Every four minutes
a replica is killed with SIGKILL; the teacher is scaled to three replicas and back in between.

Every hit is compared with the targets in the cache, and every miss with a plain `transformers` forward. Exits 1 when a
hit is not answered or wrong, a miss is answered wrong, fails without `Retry-After`, or fewer than 95 % of the
misses are answered.

The service has `MALLOC_ARENA_MAX=2`, as in `deploy`, unless it is set otherwise. Of its memory the report gives the
range over each eighth of the time, with the misses kept by then, and the growth by misses kept.

    python -m benchmarks.bench_load [--minutes 10] [--clients 200] [--hits 0.8] [--kill-minutes 4]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

from potstill.cache import Cache, Fields, Targets
from potstill.cache.types import Tokens
from potstill.cache.wire import scores as wire
from tests.support.corpora import topics, write_texts
from tests.support.tiny_models import make_tiny_llama

K = 8
BOUND = 0.0635 + 2e-3  # of `u8`, and float noise between batches
ROW_TOKENS = 48
MODEL_NAME = "tiny"
CONFIG = """
cache = "{cache}"
port = {port}
[ray]
address = "local"
[logs]
level = "warning"
[[teachers]]
name = "tiny"
model = "{model}"
replicas = 2
max_replicas = 3
options = {{ dtype = "float32", max_row_tokens = 64 }}
resources = {{ cpus = 0.5 }}
"""


@dataclass(frozen=True)
class Resident:
    """Memory of the service's process at one time, and the number of misses that it had kept by then."""

    seconds: float
    mib: float
    kept: int


@dataclass
class Seen:
    """Outcomes and seconds of the clients' requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"hit": [], "miss": []})
    wrong: list[str] = field(default_factory=list)
    misses: list[tuple[Tokens, Targets]] = field(default_factory=list)
    resident: list[Resident] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    url: str
    pid: int
    corpus_rows: list[Tokens]
    expected: list[Targets]
    hit_share: float
    ends: float
    seen: Seen


async def client(load: Load, seed: int, http: httpx.AsyncClient) -> None:
    rng = random.Random(seed)
    numpy_rng = np.random.default_rng(seed)
    while time.monotonic() < load.ends:
        if rng.random() < load.hit_share:
            index = rng.randrange(len(load.corpus_rows))
            wait = await ask(load, http, "hit", load.corpus_rows[index], load.expected[index])
        else:
            row = numpy_rng.integers(0, 512, ROW_TOKENS).astype(np.uint32)
            wait = await ask(load, http, "miss", row, None)
        await asyncio.sleep(wait or rng.uniform(0.2, 0.8))


async def ask(load: Load, http: httpx.AsyncClient, kind: str, row: Tokens, expected: Targets | None) -> float:
    """One request; the seconds that a refusal asks to wait."""
    body = wire.request_to_arrow(wire.ScoreRequest([row], Fields(k=K)))
    headers = {"content-type": wire.ARROW_MEDIA_TYPE, "accept": wire.ARROW_MEDIA_TYPE}
    begin = time.perf_counter()
    try:
        reply = await http.post(f"/v1/teachers/{MODEL_NAME}/score", content=body, headers=headers)
    except httpx.HTTPError as error:
        load.seen.outcomes[f"{kind} broken: {type(error).__name__}"] += 1
        return 1.0
    load.seen.seconds[kind].append(time.perf_counter() - begin)
    if reply.status_code in (429, 503) and reply.headers.get("retry-after", "").isdecimal():
        load.seen.outcomes[f"{kind} refused with Retry-After"] += 1
        return float(reply.headers["retry-after"])
    if reply.status_code != 200:
        load.seen.outcomes[f"{kind} failed: {reply.status_code} {reply.text[:120]}"] += 1
        return 1.0
    load.seen.outcomes[f"{kind} answered"] += 1
    (targets,) = wire.answer_from_arrow(reply.content).targets
    if expected is None:
        load.seen.misses.append((row, targets))
    elif not (np.array_equal(targets.ids, expected.ids) and np.array_equal(targets.logprobs, expected.logprobs)):
        load.seen.wrong.append("a hit is not what the cache holds")
    return 0.0


async def disturb(load: Load, kill_seconds: float, total: float) -> None:
    """Kill a replica now and then; two replicas, three in the middle, two again."""
    begin = time.monotonic()
    kills = np.arange(kill_seconds, total, kill_seconds).tolist()
    plan: list[tuple[float, str]] = [(at, "kill") for at in kills]
    plan += [(0.25 * total, "scale 3"), (0.7 * total, "scale 2")]
    async with httpx.AsyncClient(base_url=load.url, timeout=120) as http:
        for at, what in sorted(plan):
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            if what == "kill":
                victims = replica_processes(load.pid)
                victim = random.choice(victims)
                victim.send_signal(signal.SIGKILL)
                load.seen.events.append(f"{at:5.0f} s: killed one of {len(victims)} replicas")
            else:
                wanted = int(what.split()[1])
                reply = await http.put(f"/v1/teachers/{MODEL_NAME}/replicas", json={"replicas": wanted})
                load.seen.events.append(f"{at:5.0f} s: scaled to {wanted}: {reply.status_code}")


def replica_processes(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [process for process in children if "ServeReplica" in " ".join(command_line(process))]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


async def watch(load: Load, total: float) -> None:
    begin = time.monotonic()
    async with httpx.AsyncClient(base_url=load.url, timeout=60) as http:
        while (now := time.monotonic() - begin) < total:
            mib = psutil.Process(load.pid).memory_info().rss / 2**20
            load.seen.resident.append(Resident(now, mib, len(load.seen.misses)))
            if len(load.seen.resident) % 12 == 0:
                status = (await http.get(f"/v1/teachers/{MODEL_NAME}/replicas")).json()
                done = sum(count for what, count in load.seen.outcomes.items() if "answered" in what)
                print(
                    f"  {now:4.0f} s: {done} answered, {status['replicas']} of {status['target']} replicas", flush=True
                )
            await asyncio.sleep(5)


async def run_load(load: Load, args: argparse.Namespace) -> None:
    total = args.minutes * 60
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=load.url, timeout=300, limits=limits) as http:
        clients = [client(load, seed, http) for seed in range(args.clients)]
        await asyncio.gather(*clients, disturb(load, args.kill_minutes * 60, total), watch(load, total))


def check_misses(seen: Seen, folder: Path) -> float:
    """The largest |difference| in nats of a kept logprob to a plain float32 forward; wrong ones are noted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for start in range(0, len(seen.misses), 64):
        batch = seen.misses[start : start + 64]
        tokens = torch.from_numpy(np.stack([row for row, _ in batch]).astype(np.int64))
        with torch.no_grad():
            logprobs: NDArray[np.float32] = model(tokens).logits.log_softmax(-1).numpy()
        for (_, targets), exact in zip(batch, logprobs, strict=True):
            kept = np.take_along_axis(exact, targets.ids.astype(np.int64), axis=1)
            off = float(np.abs(kept - targets.logprobs).max())
            # The smallest kept one is not under what a k-th largest could be.
            left_out = np.sort(exact, axis=1)[:, -K] - kept.min(axis=1)
            worst = max(worst, off)
            if off > BOUND or float(left_out.max()) > BOUND:
                seen.wrong.append(f"a miss is {off:.3f} nats off, or misses an entry by {left_out.max():.3f}")
    return worst


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_service(folder: Path, cache: Path, model: Path) -> tuple[subprocess.Popen[str], str]:
    port = free_port()
    config = folder / "service.toml"
    config.write_text(CONFIG.format(cache=cache, port=port, model=model))
    command = [sys.executable, "-m", "potstill.clients.cli", "serve", str(config)]
    environment = {"MALLOC_ARENA_MAX": "2", **os.environ}
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    assert service.stdout is not None
    line = service.stdout.readline()
    if not line.startswith("ready:"):
        sys.exit(f"the service did not start: {line!r}")
    return service, f"http://127.0.0.1:{port}"


def prepare(folder: Path) -> tuple[Path, Path]:
    """A model folder and a cache with a corpus of rows of text."""
    model = make_tiny_llama(folder / MODEL_NAME, seed=0)
    write_texts(folder / "texts", topics(100))
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", str(folder / "texts"), "--corpus", "docs"]
    options = ["--cache", str(folder / "cache"), "--tokenizer", str(model), "--row-tokens", str(ROW_TOKENS)]
    subprocess.run([*command, *options], check=True)
    return model, folder / "cache"


def fill(cache: Path, model: Path) -> None:
    command = [sys.executable, "-m", "potstill.clients.cli", "prefill", "--cache", str(cache), "--corpus", "docs"]
    subprocess.run([*command, "--teacher", f"{MODEL_NAME}={model}", "--top-k", str(K)], check=True)


def report(seen: Seen, worst: float) -> bool:
    for what in sorted(seen.events):
        print("  " + what)
    for what, count in sorted(seen.outcomes.items()):
        print(f"  {count:8,} {what}")
    for kind, seconds in seen.seconds.items():
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
        print(f"  {kind}: latency ms p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}, max {max(seconds) * 1000:.0f}")
    report_memory(seen.resident)
    print(f"  misses: at most {worst:.4f} nats off a plain forward; wrong answers: {len(seen.wrong)} {seen.wrong[:3]}")
    answered, refused = seen.outcomes["miss answered"], seen.outcomes["miss refused with Retry-After"]
    misses = sum(count for what, count in seen.outcomes.items() if what.startswith("miss"))
    hits = sum(count for what, count in seen.outcomes.items() if what.startswith("hit"))
    print(
        f"  misses answered: {answered / max(1, misses):.2%}; hits answered: {seen.outcomes['hit answered'] / hits:.2%}"
    )
    bad = misses - answered - refused + hits - seen.outcomes["hit answered"]
    return not seen.wrong and not bad and answered >= 0.95 * misses


def report_memory(resident: list[Resident]) -> None:
    """Growth by misses kept: what is a cost of rows goes on with them, what is a plateau does not."""
    end = resident[-1].seconds
    print(f"  service MiB: at the start {resident[0].mib:.0f}, most {max(each.mib for each in resident):.0f}")
    for start, stop in zip(np.linspace(0, end, 9)[:-1], np.linspace(0, end, 9)[1:], strict=True):
        part = [each for each in resident if start <= each.seconds <= stop]
        if part:
            least, most = min(each.mib for each in part), max(each.mib for each in part)
            print(f"    to {stop:4.0f} s, {part[-1].kept:7,} misses kept: {least:.0f} to {most:.0f}")
    for name, start, stop in (("second", 0.25, 0.5), ("third", 0.5, 0.75), ("last", 0.75, 1.0)):
        part = [each for each in resident if start * end <= each.seconds <= stop * end]
        kept = [each.kept for each in part]
        if len(set(kept)) > 1:
            slope = np.polyfit(kept, [each.mib for each in part], 1)[0] * 1000
            print(f"    in the {name} quarter {slope:+.2f} MiB per 1,000 misses kept, by a straight line")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--hits", type=float, default=0.8, help="share of requests that the cache can answer")
    parser.add_argument("--kill-minutes", type=float, default=4.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, root = prepare(folder)
        fill(root, model)
        cache = Cache.open(root)
        corpus, targets = cache.corpus("docs"), cache.targets(MODEL_NAME, "docs")
        rows = list(range(len(corpus)))
        service, url = start_service(folder, root, model)
        try:
            seen = Seen()
            ends = time.monotonic() + args.minutes * 60
            expected = targets.read_rows(rows)
            load = Load(url, service.pid, [corpus.row(i) for i in rows], expected, args.hits, ends, seen)
            asyncio.run(run_load(load, args))
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(timeout=120)
        good = report(seen, check_misses(seen, model))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
