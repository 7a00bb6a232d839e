"""Trials of a student give the same when workers share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from potstill.student_trainer.data.packing import keeps_rows_apart
from potstill.student_trainer.losses.objective import Objective
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.distilled import Distilled
from potstill.student_trainer.models.router import router_loss_of
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.parallel.fsdp import FsdpGroup
from tests.support.processes.training_workers import process_group
from tests.support.tiny_runs import STUDENT, VOCAB

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "output_router_logits": True}
STUDENTS: list[dict[str, Any]] = [
    {**STUDENT, "num_hidden_layers": 3, "tie_word_embeddings": True},
    {**STUDENT, "model_type": "mixtral", **EXPERTS},
    {**STUDENT, "model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 1},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
]


@pytest.fixture(scope="module")
def group() -> Iterator[FsdpGroup]:
    with process_group():
        yield FsdpGroup(device=torch.device("cpu"))


@pytest.mark.parametrize("config", STUDENTS, ids=lambda config: config["model_type"])
def test_a_shared_student_is_found_to_be_what_it_is_alone(group: FsdpGroup, config: dict[str, Any]) -> None:
    alone, _ = build_student(StudentConfig(config=config), seed=0, vocab_size=VOCAB, row_tokens=12)
    shared, _ = group.share(
        lambda: build_student(StudentConfig(config=config), seed=0, vocab_size=VOCAB, row_tokens=12)
    )
    assert router_loss_of(shared) == router_loss_of(alone)
    assert keeps_rows_apart(shared) == keeps_rows_apart(alone)
    ours, theirs = (Distilled(student, "float32", Objective()) for student in (shared, alone))
    assert ours.fused == theirs.fused
    names = [name for name, _ in alone.named_parameters()]
    assert [name for name, _ in shared.named_parameters()] == names, "tied weights stay tied"
