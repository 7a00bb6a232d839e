"""Rows and targets in other people's loops: loaders with workers, and Accelerate."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from potstill.cache.cache import Cache
from potstill.student_trainer.data import Batch, BatchReader, TargetDataset
from potstill.student_trainer.data.sources import cache_source
from potstill.student_trainer.losses import TeacherTargets, distillation_loss
from tests.support.tiny_runs import STUDENT, VOCAB, write_cache

# Python 3.12 warns of every fork of a process with threads; that is what is tried here.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TargetDataset:
    cache = Cache.open(write_cache(tmp_path_factory.mktemp("cache"), documents=8))
    source = cache_source("fake", cache.targets("fake", "docs"))
    return TargetDataset(BatchReader(cache.corpus("docs"), (source,), (0.5,), prefix=(3,)))


def loader_of(dataset: TargetDataset, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, collate_fn=dataset.collate, **settings)


def same(batch: dict[str, Any], expected: Batch) -> bool:
    [teacher], [ours] = expected.teachers, [TeacherTargets(**each) for each in batch["teachers"]]
    pairs = [
        (batch["input_ids"], expected.tokens),
        (batch["labels"], expected.labels),
        (batch["mask"], expected.mask),
        (ours.ids, teacher.ids),
        (ours.logprobs, teacher.logprobs),
        (ours.log_tail, teacher.log_tail),
    ]
    assert isinstance(ours.weight, float)
    return ours.weight == 0.5 and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_give_what_a_reader_reads(dataset: TargetDataset, context: str) -> None:
    workers = {"num_workers": 2 if context == "fork" else 1, "multiprocessing_context": context, "timeout": 300}
    found = list(loader_of(dataset, **workers))
    assert len(found) == -(-len(dataset) // 4)
    for i, batch in enumerate(found):
        rows = range(4 * i, min(4 * i + 4, len(dataset)))
        assert same(batch, dataset.reader.read(rows))


def test_rows_of_a_batch_may_share_one(dataset: TargetDataset) -> None:
    examples = [dataset[i] for i in range(12)]
    batch, plain = dataset.collate(examples, pack=True), dataset.collate(examples)
    assert "position_ids" not in plain
    assert len(batch["input_ids"]) < len(plain["input_ids"]) == 12
    assert int(batch["mask"].sum()) == int(plain["mask"].sum())
    assert int((batch["position_ids"] == 0)[batch["input_ids"] == 3].sum()) >= 12


def test_accelerate_prepares_loader_and_student(dataset: TargetDataset) -> None:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from transformers import LlamaConfig, LlamaForCausalLM

    accelerator = Accelerator(cpu=True)
    settings = {name: value for name, value in STUDENT.items() if name != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **settings))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loader = DataLoader(dataset, batch_size=8, collate_fn=partial(dataset.collate, pack=True))
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
            logits = student(batch["input_ids"], use_cache=False, **positions).logits
            loss = distillation_loss(
                logits,
                batch["labels"],
                [TeacherTargets(**each) for each in batch["teachers"]],
                alpha=0.5,
                mask=batch["mask"],
                num_labels=int((batch["labels"] != -100).sum()),
                num_positions=int(batch["mask"].sum()),
            )
            accelerator.backward(loss.total)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.total.detach()))
    assert losses[-1] < losses[0]
