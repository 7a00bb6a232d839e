"""A student with its loss: fused with the last layer where that is the same, and the same where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from potstill.student_trainer.losses import NO_LABEL, Objective
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.distilled import Distilled
from potstill.student_trainer.models.settings import StudentConfig
from tests.student_trainer.losses.dense_forms import random_array, top_k_of

V = 40
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 0.5},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "mixtral": {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True},
}


def student_of(model_type: str) -> PreTrainedModel:
    config = StudentConfig(config={"model_type": model_type, **STUDENTS[model_type]})
    student, _ = build_student(config, seed=0, vocab_size=V, row_tokens=8)
    return student.eval()


def loss_and_gradients(model: Distilled) -> tuple[float, dict[str, torch.Tensor], Any]:
    tokens = torch.arange(16).reshape(2, 8)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = NO_LABEL
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    teacher = top_k_of(torch.log_softmax(random_array(0, 2, 8, V), -1), 5)
    model.zero_grad()
    loss, router_logits = model(
        {"input_ids": tokens, "use_cache": False}, labels, mask, [teacher], alpha=0.5, num_labels=11, num_positions=13
    )
    loss.total.backward()
    return loss.total.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, router_logits


@pytest.mark.parametrize("model_type", STUDENTS)
def test_the_fused_loss_is_that_of_the_logits(model_type: str) -> None:
    student = student_of(model_type)
    fused = Distilled(student, "float32", Objective())
    assert fused.fused
    value, grads, router = loss_and_gradients(fused)
    expected, expected_grads, expected_router = loss_and_gradients(
        Distilled(student, "float32", Objective(), fused=False)
    )
    assert value == pytest.approx(expected, rel=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-7, msg=name)
    assert (router is None) == (expected_router is None) == (model_type != "mixtral")


def test_a_last_layer_that_is_more_than_linear_is_left_to_the_model() -> None:
    class Warmer(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * 2.0

    student = student_of("llama")
    student.set_output_embeddings(Warmer(16, V, bias=False))
    model = Distilled(student, "float32", Objective())
    assert not model.fused
    assert loss_and_gradients(model)[0] > 0


def test_logits_that_the_model_changes_are_left_to_it() -> None:
    student = student_of("gemma2")
    student.config.final_logit_softcapping = None
    forward = student.forward

    def capped(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = out.logits.clamp(max=1.0)
        return out

    student.forward = capped
    assert not Distilled(student, "float32", Objective()).fused
