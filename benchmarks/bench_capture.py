"""Cost of capture: tokens/s of one engine by every capture path, interleaved in one run, and of the frontend alone.

A random 19M Llama (V=32k, 4 layers, d=256) and, with `--smollm2`, SmolLM2-135M; rows of 512 tokens, K=64; the engine
in this process and in one of its own. `prefill` scores nothing. `dicts` is vLLM's default, left as it comes; all others
end in `Targets`, `dicts to targets` by a loop over what vLLM gives. The frontend is timed from the engine's output
objects to `Targets`, in one thread.

    python -m benchmarks.bench_capture [--smollm2] [--rounds 5] [--rows 8]

Exits 1 when an aim of the tiny model is missed. Only ratios mean something while the machine is shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from potstill.cache.types import Fields
from potstill.teacher_service.capture.layout import Asked
from potstill.teacher_service.capture.targets import FlatEntries, targets_from_flat
from potstill.teacher_service.engine.vllm_engine import VllmEngine

K = 64
ROW_TOKENS = 512
EXTRAS = Fields(k=K, draws=50, seed=1, entropy=True, temperatures=(0.5, 2.0))
AIMS = (
    # engine, what, against, at least; 0 is no aim
    ("in process", "sampler", "dicts", 2.2),
    ("in process", "sampler", "dicts to targets", 0),
    ("in process", "sampler", "flat", 1.3),
    ("own process", "sampler", "dicts", 1.4),
    ("own process", "sampler", "dicts to targets", 0),
    ("own process", "sampler", "flat", 1.2),
    ("in process", "sampler + extras", "sampler", 1 / 1.4),
    ("own process", "sampler + extras", "sampler", 1 / 1.4),
)
FRONTEND_AIM = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="measure SmolLM2-135M too; it has no aims")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="rows a measurement (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # As in the service, torch is first imported by the engine, which sets how its threads wait.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(make_model, Path(folder)).result()
        missed = measure_model("random 19M Llama", Path(folder), args.rounds, args.rows, has_aims=True)
    if args.smollm2:
        from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise

        measure_model("SmolLM2-135M", materialise(default_models_folder()), args.rounds, args.rows, has_aims=False)
    return int(missed)


def make_model(folder: Path) -> None:
    """19M parameters, of which 16M are the embedding and the head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure_model(name: str, folder: Path, rounds: int, num_rows: int, *, has_aims: bool) -> bool:
    """Print the table of one model; whether an aim was missed."""
    engines = {where: open_engine(folder) for where in ("in process", "own process")}  # the second gets its own
    try:
        for where, engine in engines.items():
            print(f"{name}, {where}: path {engine.facts.provenance.capture_path}", flush=True)
        seconds = interleaved(engines, rounds, num_rows)
        missed = report(name, seconds, num_rows, has_aims=has_aims)
        return report_frontend(engines["in process"]) or missed
    finally:
        for engine in engines.values():
            engine.close()


def open_engine(folder: Path) -> VllmEngine:
    arguments = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": ROW_TOKENS + 1,
        "max_num_batched_tokens": 2048,
        "max_logprobs": 256,
        "logprobs_mode": "raw_logprobs",
        "hf_overrides": {"head_dtype": "float32"},
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": 1 << 30,
    }
    return VllmEngine(arguments)


def modes() -> dict[str, tuple[Any, Fields]]:
    """Name -> capture path and what it is asked for."""
    from vllm import SamplingParams

    from potstill.teacher_service.capture.paths import ArraysPath, PublicFlatPath, SamplerPath

    class PrefillOnly(PublicFlatPath):
        def sampling_params(self, asked: Asked) -> Any:  # noqa: ARG002 -- nothing is asked for
            return SamplingParams(max_tokens=1, temperature=0, detokenize=False)

        def targets(self, output: Any, asked: Asked, vocab_size: int) -> Any:  # noqa: ARG002 -- there are none
            return None

    class Dicts(PrefillOnly):
        def sampling_params(self, asked: Asked) -> Any:
            k = asked.want.k
            return SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=k, logprobs=k)

    class DictsToTargets(Dicts):
        def targets(self, output: Any, asked: Asked, vocab_size: int) -> Any:
            k = asked.want.k
            last = output.outputs[0]
            return targets_from_flat(
                entries(zip(asked.tokens[1:], output.prompt_logprobs[1:], strict=True), k),
                entries(zip(last.token_ids, last.logprobs, strict=True), k),
                asked,
                vocab_size,
            )

    top_k = Fields(k=K)
    return {
        "prefill": (PrefillOnly(), top_k),
        "dicts": (Dicts(), top_k),
        "dicts to targets": (DictsToTargets(), top_k),
        "flat": (PublicFlatPath(), top_k),
        "arrays": (ArraysPath(), top_k),
        "sampler": (SamplerPath(), top_k),
        "sampler + extras": (SamplerPath(), EXTRAS),
    }


def entries(positions: Iterable[tuple[int, dict[int, Any]]], k: int) -> FlatEntries:
    """Flatten vLLM's dicts, one a token: the token's own entry first, then the best `k`."""
    ids: list[int] = []
    logprobs: list[float] = []
    for token, position in positions:
        best = sorted(position.items(), key=lambda entry: entry[1].rank)[:k]
        ids += [token, *(entry[0] for entry in best)]
        logprobs += [position[token].logprob, *(entry[1].logprob for entry in best)]
    return FlatEntries(ids=ids, logprobs=logprobs)


def interleaved(engines: dict[str, VllmEngine], rounds: int, num_rows: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each round, after one that warms up."""
    rng = np.random.default_rng(0)
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        rows = rng.integers(0, 32_000, (num_rows, ROW_TOKENS)).tolist()
        for where, engine in engines.items():
            for mode, (path, want) in modes().items():
                began = time.perf_counter()
                score(engine, path, want, rows)
                if turn:
                    seconds.setdefault((where, mode), []).append(time.perf_counter() - began)
    return seconds


def score(engine: VllmEngine, path: Any, want: Fields, rows: Sequence[list[int]]) -> list[Any]:
    """The engine's outputs of all rows, each turned into `Targets` as it comes."""
    asked = {str(i): Asked(tokens=row, num_prefix=0, want=want) for i, row in enumerate(rows)}
    for request_id, one in asked.items():
        engine.add(request_id, one, path=path)
    outputs: list[Any] = []
    while len(outputs) < len(rows):
        if not engine.can_step():
            time.sleep(0.002)
            continue
        for request_id, output in engine.step():
            path.targets(output, asked[request_id], engine.facts.vocab_size)
            outputs.append(output)
    return outputs


def report(name: str, seconds: dict[tuple[str, str], list[float]], num_rows: int, *, has_aims: bool) -> bool:
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    tokens = num_rows * ROW_TOKENS
    print(f"\n{name}: tokens/s, medians of {len(next(iter(seconds.values())))} rounds of {tokens:,} tokens")
    for where in dict.fromkeys(where for where, _ in medians):
        line = ", ".join(f"{mode} {tokens / value:,.0f}" for (at, mode), value in medians.items() if at == where)
        print(f"  {where:12}{line}")
    missed = False
    for where, what, against, least in AIMS:
        ratio = medians[where, against] / medians[where, what]
        below = has_aims and ratio < least
        missed |= below
        aim = f" (aim {least:.2f})" if has_aims and least else ""
        print(f"  {where:12}{what} / {against}: {ratio:.2f}{aim}{'  MISSED' if below else ''}")
    return missed


def report_frontend(engine: VllmEngine) -> bool:
    """Tokens/s of one thread from output objects to `Targets`."""
    rates = {}
    row = np.random.default_rng(1).integers(0, 32_000, ROW_TOKENS).tolist()
    for mode, (path, want) in modes().items():
        if mode in ("prefill", "dicts"):  # they end before `Targets`
            continue
        [output] = score(engine, path, want, [row])
        asked = Asked(tokens=row, num_prefix=0, want=want)
        rates[mode] = ROW_TOKENS / fastest(partial(path.targets, output, asked, engine.facts.vocab_size))
    print("  frontend    " + ", ".join(f"{mode} {rate:,.0f}" for mode, rate in rates.items()), flush=True)
    return rates["sampler"] < FRONTEND_AIM


def fastest(call: Callable[[], Any], repeats: int = 50) -> float:
    """Seconds of the fastest call: others on the machine only ever add."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
