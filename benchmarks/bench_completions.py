"""Tokens a second and bytes on the wire of `/v1/completions` with prompt logprobs: ours from the cache and from the
engine, beside vLLM's own server, for the same rows of the same tiny model.

    python -m benchmarks.bench_completions --k 64
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np

from tests.support.processes.vllm_server import potstill_serving, vllm_serving
from tests.support.tiny_models import make_tiny_llama


def rate(url: str, rows: list[list[int]], *, k: int, rounds: int) -> dict[str, float]:
    """The best of some rounds, after one that warms up and fills the cache."""
    body = {"model": "tiny", "prompt": rows, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
    num_tokens = sum(map(len, rows))
    seconds = []
    with httpx.Client(timeout=600.0) as client:
        client.post(f"{url}/v1/completions", json=body).raise_for_status()
        for _ in range(rounds):
            begin = time.perf_counter()
            reply = client.post(f"{url}/v1/completions", json=body)
            seconds.append(time.perf_counter() - begin)
    return {
        "tokens_per_second": round(num_tokens / min(seconds)),
        "bytes_per_token": round(len(reply.content) / num_tokens),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 512, (args.rows, args.row_tokens)).tolist()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        model = make_tiny_llama(Path(name) / "model")
        for server, serve in {
            "vllm": vllm_serving(model, max_logprobs=args.k),
            "ours, engine": potstill_serving(model),
            "ours, cache": potstill_serving(model, cache=Path(name) / "cache"),
        }.items():
            with ExitStack() as stack:
                found[server] = rate(stack.enter_context(serve), rows, k=args.k, rounds=args.rounds)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
