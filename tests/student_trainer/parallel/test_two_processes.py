"""The first step of two real processes, packed and accumulated, against single rows in float64."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.losses import distillation_loss
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.distilled import Distilled
from potstill.student_trainer.parallel.fsdp import group_class
from potstill.student_trainer.train.learner import Learner
from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache

WORKERS = 2


def first_step(rank: int, file: str, config: TrainConfig) -> None:
    """Take a worker's first step; rank 0 writes its record and the gradients of all."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{file}.store", rank=rank, world_size=WORKERS)
    try:
        group = group_class(config.train.parallel)(device=torch.device("cpu"), rank=rank, world_size=WORKERS)
        with open_run(config) as run:
            student, _ = build_student(
                config.student, seed=0, vocab_size=run.vocab_size, row_tokens=run.row_tokens, special_ids={}
            )
            learner = Learner.of(config, group, run, student)
            with learner.read_steps([0]).until_closed() as batches:
                record, _, _ = learner.step(0, batches, lambda: False)
        grads = {name: whole(weight.grad) for name, weight in student.named_parameters()}
        distilled = learner.model.module if config.train.parallel == "ddp" else learner.model
        assert isinstance(distilled, Distilled)
        if rank == 0:
            torch.save({"loss": record["loss"], "fused": distilled.fused, "packs": learner.packs, **grads}, file)
    finally:
        distributed.destroy_process_group()


def whole(grad: Any) -> torch.Tensor:
    found: torch.Tensor = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def both_ways(rank: int, configs: list[TrainConfig]) -> None:
    """Train both ways in one process, as its imports are what takes long."""
    for config in configs:
        first_step(rank, str(config.run_dir), config)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[TrainConfig]:
    folder = tmp_path_factory.mktemp("two")
    root = write_cache(folder, teachers=("fake", "second"))
    teachers = [{"name": "fake", "weight": 3.0}, {"name": "second", "k": 3}]
    student = {"config": {**STUDENT, "num_hidden_layers": 2, "tie_word_embeddings": True}}
    # An odd number of rows, in several micro-batches of each worker; no clipping, which would change the gradient.
    loop = {"batch_rows": 15, "micro_batch_rows": 2, "grad_clip": 1e9, "workers": WORKERS}
    same: dict[str, Any] = {"teachers": teachers, "student": student}
    made = [
        config_of(root, folder / parallel, **same, train={**loop, "parallel": parallel}) for parallel in ("ddp", "fsdp")
    ]
    # Both are forked from one that imports what takes long, and starts no threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    start_processes(both_ways, (made,), nprocs=WORKERS, start_method="forkserver")  # type: ignore[no-untyped-call]
    return made


@pytest.fixture(scope="module")
def exact(configs: list[TrainConfig]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the step's rows, one by one and unpadded, from float64 logits."""
    config, total = configs[0], 0.0
    with open_run(config) as run:
        student, _ = build_student(config.student, seed=0, vocab_size=VOCAB, row_tokens=run.row_tokens, special_ids={})
        student.double()
        rows = run.order.rank_slice(0, 0, 1)
        counts = run.reader.measure(rows)
        for row in rows:
            batch = run.reader.read([int(row)])
            loss = distillation_loss(
                student(**batch.inputs).logits,
                batch.labels,
                batch.teachers,
                alpha=0.5,
                mask=batch.mask,
                num_labels=counts.num_labels,
                num_positions=counts.num_positions,
            ).total
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
    return total, {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("way", [0, 1], ids=["ddp", "fsdp"])
def test_the_first_gradient_is_that_of_single_rows(
    configs: list[TrainConfig], exact: tuple[float, dict[str, torch.Tensor]], way: int
) -> None:
    found = torch.load(configs[way].run_dir, weights_only=True)
    assert found.pop("fused")
    assert found.pop("packs")
    loss, gradients = exact
    assert found.pop("loss") == pytest.approx(loss, abs=1e-6)
    assert found.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    off = max(float((found[name].double() - gradient).abs().max()) for name, gradient in gradients.items())
    assert off < 1e-6 * max(1.0, largest)
