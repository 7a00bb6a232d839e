"""A tiny Llama with BOS in front of each row is the teacher and, unchanged, the student: KL where it must be 0.

Targets are of a plain `transformers` forward; the trainer measures the student before its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.cache.cache import Cache
from potstill.cache.types import Fields, Targets
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, fake_teacher, write_cache

BOS = (1,)
CASES = ("f32", "u8", "prefix f32", "prefix u8")
"""Encodings, without a prefix and with one."""


def save_model(folder: Path) -> LlamaForCausalLM:
    """Save a random model whose answers differ clearly with what is in front of a row."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**STUDENT, "initializer_range": 0.3}, vocab_size=VOCAB)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def fill(root: Path, model: LlamaForCausalLM, name: str, prefix: Sequence[int], encoding: str) -> None:
    """Commit the model's targets, with a prefix in front of each row whose own targets are dropped."""
    cache = Cache.open(root, "r+")
    corpus, teacher = cache.corpus("docs"), fake_teacher(name)
    identity = replace(teacher.identity, prefix_ids=tuple(prefix))
    targets = cache.plan_targets(name, "docs", identity, fields=Fields(k=8), encoding=encoding)
    for shard in range(corpus.num_shards):
        rows = corpus.rows(*(int(r) for r in corpus.shard_rows[shard : shard + 2]))
        answers = []
        for row in rows:
            ids = torch.tensor([[*prefix, *row.tolist()]])
            with torch.no_grad():
                log_p = model(ids).logits[0, len(prefix) :].double().log_softmax(-1)
            top, kept = log_p.topk(8)
            tail = torch.log1p(-top.exp().sum(-1))
            label = np.full(len(row), np.nan, dtype=np.float32)
            label[:-1] = log_p[np.arange(len(row) - 1), row[1:].astype(np.int64)].numpy()
            kept_p, tail_p = (each.numpy().astype(np.float32) for each in (top, tail))
            answers.append(Targets(kept.numpy().astype(np.uint32), kept_p, tail_p, label))
        targets.write_shard(shard, Targets.concat(answers), teacher.provenance)


def measured_kl(cache: str | Path, model: Path, out: Path, name: str) -> float:
    """KL on held-out rows of a student that is the model itself."""
    student = {"config": None, "checkpoint": str(model)}
    changes = {"data": {"cache": str(cache)}, "teachers": [{"name": name}], "train": {"steps": 1}}
    train(config_of(Path("unused"), out, student=student, **changes))
    return float(read_metrics(out)[0]["held_out"]["teachers"][name]["kl"])


def measure(folder: Path, cases: Sequence[str] = CASES) -> dict[str, float]:
    """Measure the KL in some cases, from the folder and over HTTP."""
    model = save_model(folder / "model")
    root = write_cache(folder / "data", documents=30, teachers=())
    found: dict[str, float] = {}
    for case in cases:
        fill(root, model, case.replace(" ", "-"), BOS if "prefix" in case else (), case.removeprefix("prefix "))
    with serving_teachers(hosted("other", FakeTeacher()), cache=Cache.open(root)) as url:
        for case in cases:
            name = case.replace(" ", "-")
            found[case] = measured_kl(root, folder / "model", folder / name, name)
            found[f"{case} HTTP"] = measured_kl(url, folder / "model", folder / f"{name}-http", name)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOUND = measure(Path.cwd())
    print(
        "KL "
        + ", ".join(
            f"{max(abs(kl) for case, kl in FOUND.items() if case.removesuffix(' HTTP') == kind):.5f} {kind}"
            for kind in CASES
        )
    )
