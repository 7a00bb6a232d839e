"""Activations computed again give the run that keeping them gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.parallel.activation import compute_again
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_a_run_is_the_same_with_activations_computed_again(tmp_path: Path) -> None:
    root = write_cache(tmp_path)
    student = {"config": {**STUDENT, "attention_dropout": 0.1}}  # the same dropout is drawn again
    losses = []
    for again in (False, True):
        out = tmp_path / f"run-{again}"
        train(config_of(root, out, student=student, train={"steps": 3, "activation_checkpointing": again}))
        losses.append([(record["loss"], record["grad_norm"]) for record in read_metrics(out) if "loss" in record])
    assert losses[0] == losses[1]


def test_activations_are_dropped_and_computed_again() -> None:
    student, _ = build_student(StudentConfig(config=STUDENT), seed=0, vocab_size=48, row_tokens=12)
    passes = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    compute_again(student.train())
    logits = student(input_ids=student.dummy_inputs["input_ids"] % 48, use_cache=False).logits
    assert len(passes) == 1
    logits.sum().backward()
    assert len(passes) == 2


def test_a_model_without_such_layers_is_refused() -> None:
    student, _ = build_student(StudentConfig(config=STUDENT), seed=0, vocab_size=48, row_tokens=12)
    student.supports_gradient_checkpointing = False
    with pytest.raises(InvalidInput, match="activation_checkpointing is true, but model_type 'llama'"):
        compute_again(student)
