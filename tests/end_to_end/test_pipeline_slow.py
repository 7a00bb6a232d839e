"""The whole way with real parts. Minutes each: run by `make test-slow`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache, Fields
from potstill.cache.cache import Cache as OpenCache
from potstill.cache.commands.prefill import prefill
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.fill.loop import FillPlan
from potstill.cache.store.root import Root
from potstill.cache.targets.commit import segment_path
from potstill.cache.upkeep.integrity import corrupt_shard_objects
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.demo.service import running_service
from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise
from potstill.student_trainer.demo.text import write_text
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning:ray.data.context"),
]

STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def train_config(cache: Path, out: Path, teachers: dict[str, float], *, steps: int, alpha: float) -> TrainConfig:
    return TrainConfig.of(
        {
            "data": {"cache": str(cache), "corpus": "docs", "held_out": 4},
            "teachers": [{"name": name, "weight": weight} for name, weight in teachers.items()],
            "student": {"config": STUDENT},
            "train": {
                "out": str(out),
                "steps": steps,
                "batch_rows": 4,
                "micro_batch_rows": 4,
                "lr": 3e-3,
                "alpha": alpha,
                "eval_every": steps,
            },
        }
    )


def make_docs(folder: Path, model: Path, *, tokens: int, row_tokens: int, shard_positions: int) -> Path:
    tokenizer = load_tokenizer(model)
    write_text(folder / "text", tokenizer, tokens)
    plan = IngestPlan(row_tokens=row_tokens, shard_positions=shard_positions)
    ingest(Root.open(folder / "cache", create=True), "docs", [folder / "text"], tokenizer, plan)
    return folder / "cache"


def test_two_teachers_through_one_service_and_one_cache_into_one_student(tmp_path: Path) -> None:
    """SmolLM2, and a small model that is trained here and now with SmolLM2's tokenizer."""
    from potstill.student_trainer.launch.ray import train_with_ray

    big = materialise(default_models_folder())
    root = make_docs(tmp_path, big, tokens=2000, row_tokens=128, shard_positions=512)
    # The small teacher: the trainer itself, on cross-entropy, saves what vLLM loads.
    trained = train_with_ray(train_config(root, tmp_path / "small", {}, steps=25, alpha=0.0))
    small = trained.run_dir / "model"
    (small / "tokenizer.json").write_bytes((big / "tokenizer.json").read_bytes())

    settings = tmp_path / "service.toml"
    settings.write_text(
        f'cache = "{root}"\nport = 0\n[[teachers]]\nname = "big"\nmodel = "{big}"\n'
        f'[[teachers]]\nname = "small"\nmodel = "{small}"\n'
    )
    with running_service([str(settings)], tmp_path / "service.log") as url:
        for name in ("big", "small"):
            work = prefill(
                Cache.open(root, mode="r+"),
                "docs",
                name,
                f"{url}#{name}",
                fields=Fields(k=64),
                encoding="u8",
                plan=FillPlan(batch_tokens=512),
            )
            asyncio.run(work)
    cache = Cache.open(root)
    identities = {name: cache.targets(name, "docs").identity for name in ("big", "small")}
    assert identities["big"].weights_sha256 != identities["small"].weights_sha256
    assert identities["big"].tokenizer_sha256 == identities["small"].tokenizer_sha256
    assert all(cache.targets(name, "docs").committed.all() for name in identities)

    result = train_with_ray(train_config(root, tmp_path / "run", {"big": 2.0, "small": 1.0}, steps=25, alpha=1.0))
    assert result.held_out is not None
    untrained = train_with_ray(train_config(root, tmp_path / "none", {"big": 2.0, "small": 1.0}, steps=1, alpha=1.0))
    assert untrained.held_out is not None
    for name in identities:
        assert result.held_out.teachers[name].kl < 0.8 * untrained.held_out.teachers[name].kl


def start_prefill(root: Path, model: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "potstill.clients.cli", "prefill", "--cache", str(root), "--corpus", "docs"]
    command += ["--teacher", f"tiny={model}", "--encoding", "f32", "--top-k", "32", "--batch-tokens", "512"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def segment_bytes(root: Path) -> dict[tuple[int, str], bytes]:
    targets = OpenCache.open(root).targets("tiny", "docs")
    return {
        (commit.shard, item.path): (root / segment_path(segments.path, commit.segment) / item.path).read_bytes()
        for segments in targets.sets
        for commit in segments.commits.all()
        for item in commit.objects
    }


def test_a_real_teachers_prefill_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path, tiny_llama: Path) -> None:
    """Committed segments keep their bytes; the rest equals an undisturbed run's within float noise of batching."""
    whole = make_docs(tmp_path / "whole", tiny_llama, tokens=40_000, row_tokens=200, shard_positions=1000)
    killed = make_docs(tmp_path / "killed", tiny_llama, tokens=40_000, row_tokens=200, shard_positions=1000)
    assert start_prefill(whole, tiny_llama).wait() == 0

    job = start_prefill(killed, tiny_llama)
    commits = killed / "targets" / "tiny" / "docs" / "commits"
    while job.poll() is None and not (commits.exists() and len(os.listdir(commits)) >= 3):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    kept = segment_bytes(killed)
    shards = OpenCache.open(killed).corpus("docs").num_shards
    assert 3 <= len({shard for shard, _ in kept}) < shards, "the kill came too late to be in the middle"
    assert start_prefill(killed, tiny_llama).wait() == 0
    after = segment_bytes(killed)
    assert {name: after[name] for name in kept} == kept

    one, two = (OpenCache.open(root).targets("tiny", "docs") for root in (whole, killed))
    assert two.committed.all()
    a, b = (targets.read(0, targets.corpus.num_positions) for targets in (one, two))
    same = a.ids == b.ids
    assert same.mean() > 0.999, "only near ties may change places"
    assert np.abs(a.logprobs - b.logprobs).max() <= 1e-4
    assert np.nanmax(np.abs(a.label_logprob - b.label_logprob)) <= 1e-4
    assert np.abs(np.exp(a.log_tail) - np.exp(b.log_tail)).max() <= 1e-4
    assert all(corrupt_shard_objects(two.sets[0], shard) == [] for shard in range(shards))
