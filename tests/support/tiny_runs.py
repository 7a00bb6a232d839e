"""A small cache with real files, and configs of small students on it."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from potstill.cache.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.store.root import Root
from potstill.cache.types import Fields, Targets
from potstill.student_trainer.config import TrainConfig
from tests.support.corpora import write_texts
from tests.support.fakes import FakeTeacher, fake_identity

VOCAB = 48
ROW_TOKENS = 12
K = 8
TOP_K = Fields(k=K)
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def fake_teacher(model: str = "fake") -> FakeTeacher:
    sha256 = fingerprint(word_tokenizer())
    return FakeTeacher(fake_identity(vocab_size=VOCAB, tokenizer_sha256=sha256, model=model))


def write_cache(
    folder: Path,
    *,
    documents: int = 60,
    teachers: tuple[str, ...] = ("fake",),
    corpus: str = "docs",
    seed: int = 0,
) -> Path:
    """Ingest random documents of 5 to 30 words and fill every teacher's targets; returns the cache's folder."""
    if (folder / "cache").exists():
        return _write(folder, documents, teachers, corpus, seed)
    shutil.copytree(_written(documents, teachers, corpus, seed), folder, dirs_exist_ok=True)
    return folder / "cache"


@cache
def _written(documents: int, teachers: tuple[str, ...], corpus: str, seed: int) -> Path:
    """Write it once a process, to be copied: many tests begin with the same one."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
    atexit.register(shutil.rmtree, folder)
    _write(folder, documents, teachers, corpus, seed)
    return folder


def _write(folder: Path, documents: int, teachers: tuple[str, ...], corpus: str, seed: int) -> Path:
    random = np.random.default_rng(seed)
    texts = [" ".join(f"w{i}" for i in random.integers(1, VOCAB, random.integers(5, 31))) for _ in range(documents)]
    root = write_texts_cache(folder, texts, corpus=corpus)
    for name in teachers:
        fill(root, name, corpus)
    return root


def write_texts_cache(
    folder: Path, texts: list[str], *, corpus: str = "docs", tokenizer_files: Mapping[str, str] | None = None
) -> Path:
    """Ingest one document per text, of words w0 to w47; returns the cache's folder."""
    source = write_texts(folder / f"{corpus}-source", texts)
    plan = IngestPlan(row_tokens=ROW_TOKENS, shard_positions=200)
    root = Root.open(folder / "cache", create=True)
    ingest(root, corpus, [source], word_tokenizer(), plan, tokenizer_files=tokenizer_files)
    return folder / "cache"


def fill(
    root: Path,
    name: str,
    corpus: str = "docs",
    *,
    shards: int | None = None,
    encoding: str = "f32",
    fields: Fields = TOP_K,
    teacher: FakeTeacher | None = None,
) -> None:
    """Commit a fake teacher's targets for the first shards of a corpus, all by default."""
    teacher, cache = teacher or fake_teacher(name), Cache.open(root, "r+")
    rows = cache.corpus(corpus)
    targets = cache.plan_targets(name, corpus, teacher.identity, fields=fields, encoding=encoding)
    for shard in range(rows.num_shards if shards is None else shards):
        start, stop = (int(r) for r in rows.shard_rows[shard : shard + 2])
        scored = asyncio.run(teacher.score(rows.rows(start, stop), fields))
        assert targets.write_shard(shard, Targets.concat(scored), teacher.provenance) is not None


def config_of(root: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of ten steps; `changes` by section, like `train={"alpha": 0.0}`."""
    value: dict[str, Any] = {
        "data": {"cache": str(root), "corpus": "docs", "held_out": 8, "window_shards": 3, "prefetch": 2},
        "teachers": [{"name": "fake"}],
        "student": {"config": dict(STUDENT)},
        "train": {
            "out": str(out),
            "steps": 10,
            "batch_rows": 8,
            "micro_batch_rows": 3,
            "lr": 1e-2,
            "warmup": 2,
            "alpha": 0.5,
            "eval_every": 5,
            "checkpoint_every": 5,
        },
    }
    for section, change in changes.items():
        value[section] = {**value[section], **change} if isinstance(change, dict) else change
    return TrainConfig.of(value)


def unhashed(checkpoint: Path, **changes: Any) -> Path:
    """Make a checkpoint one of an earlier version, whose mark is empty, with `changes` to its state; None takes out."""
    file = checkpoint / "state.json"
    state = {**json.loads(file.read_text(encoding="utf-8")), "format": None, **changes}
    file.write_text(json.dumps({name: value for name, value in state.items() if value is not None}), encoding="utf-8")
    (checkpoint / ".complete").write_text("")
    return checkpoint


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what depends on the machine."""
    of_the_machine = ("seconds", "tokens_per_second", "waiting_seconds", "waiting_share", "peak_memory_bytes")
    return [{name: value for name, value in record.items() if name not in of_the_machine} for record in records]
