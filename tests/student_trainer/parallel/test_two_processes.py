"""Two real processes: the start, and the first step, packed and accumulated, against single rows in float64."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.checkpoint.checkpoints import checkpoints_of, load_model
from potstill.student_trainer.checkpoint.folders import folder_of
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.losses import distillation_loss
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.distilled import Distilled
from potstill.student_trainer.parallel.fsdp import group_class
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.learner import Learner
from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache

WORKERS = 2
STATE = TrainState(
    step=1, seed=0, epoch=0, cursor=15, corpus_fingerprint="", tokens=1, seconds=1.0, teachers={}, held={}
)


def first_step(rank: int, file: str, config: TrainConfig) -> None:
    """Take a worker's first step; rank 0 writes its record and the gradients of all."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{file}.store", rank=rank, world_size=WORKERS)
    try:
        group = group_class(config.train.parallel)(device=torch.device("cpu"), rank=rank, world_size=WORKERS)
        with open_run(config) as run:
            sizes = {"vocab_size": run.vocab_size, "row_tokens": run.row_tokens}
            student, _ = group.share(lambda: build_student(config.student, seed=0, **sizes, special_ids={}))
            begun = {name: whole(each).clone() for name, each in tensors(student)}
            learner = Learner.of(config, group, run, student)
            with learner.read_steps([0]).until_closed() as batches:
                record, _, _ = learner.step(0, batches, lambda: False)
        grads = {name: whole(weight.grad) for name, weight in student.named_parameters()}
        distilled = learner.model.module if config.train.parallel == "ddp" else learner.model
        assert isinstance(distilled, Distilled)
        if rank == 0:
            torch.save({"loss": record["loss"], "fused": distilled.fused, "packs": learner.packs, **grads}, file)
            torch.save(begun, f"{file}.begun")
        if config.train.parallel == "fsdp":
            begin_and_go_on(config, group, learner)
    finally:
        distributed.destroy_process_group()


def whole(value: Any) -> torch.Tensor:
    found: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found.detach()


def tensors(student: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [*student.named_parameters(remove_duplicate=False), *student.named_buffers()]


def held_bytes(student: PreTrainedModel) -> tuple[int, int]:
    """Bytes that a worker holds of a student's parameters, and those of all of them."""
    weights = list(student.parameters())
    assert all(isinstance(each, DTensor) and each.device.type == "cpu" for each in weights)
    parts = (each.to_local() for each in weights if isinstance(each, DTensor))
    return sum(each.untyped_storage().nbytes() for each in parts), sum(4 * each.numel() for each in weights)


def begin_and_go_on(config: TrainConfig, group: Group, learner: Learner) -> None:
    """Make another student, and go on from a checkpoint: the others than rank 0 never hold more than their part."""

    def make() -> tuple[PreTrainedModel, str]:
        assert group.rank == 0, "only rank 0 makes it"
        return build_student(config.student, seed=1, vocab_size=VOCAB, row_tokens=12)

    def refuse() -> tuple[PreTrainedModel, str]:
        raise InvalidInput("no such student")

    assert all(isinstance(each, DTensor) for each in learner.optimizer.state), "it has the parts"
    half, all_bytes = held_bytes(group.share(make)[0])
    assert 2 * half == all_bytes
    with pytest.raises(InvalidInput, match="no such student"):
        group.share(refuse)
    folder = config.run_dir.with_name("checkpoints")
    checkpoints = checkpoints_of(folder, group, keep=1)
    checkpoints.save(learner.student, learner.optimizer, STATE)
    checkpoints.wait()
    group.barrier()
    student = load_model(folder_of(folder, STATE.step), group)
    assert held_bytes(student) == (half, all_bytes)
    assert student.lm_head.weight is student.get_input_embeddings().weight
    for (name, mine), (_, theirs) in zip(tensors(student), tensors(learner.student), strict=True):
        assert torch.equal(whole(mine), whole(theirs)), name


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


@pytest.mark.parametrize("way", [0, 1], ids=["ddp", "fsdp"])
def test_two_begin_with_the_weights_of_one(configs: list[TrainConfig], way: int) -> None:
    student, _ = build_student(configs[way].student, seed=0, vocab_size=VOCAB, row_tokens=12, special_ids={})
    found, wanted = torch.load(f"{configs[way].run_dir}.begun", weights_only=True), dict(tensors(student))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
