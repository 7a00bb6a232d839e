"""The router loss of students with experts, against plain `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student
from potstill.student_trainer.models.router import router_loss_of
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 10.0, "initializer_range": 0.5}
MIXTRAL = {**STUDENT, "model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 4, **ROUTED}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def gradient(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("kind", EXPERTS)
def test_parts_of_a_batch_add_up_to_the_models_own_loss(kind: str) -> None:
    keys = {**STUDENT, "num_key_value_heads": 1, **ROUTED, **EXPERTS[kind], "model_type": kind, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=VOCAB, **keys))
        tokens = torch.randint(VOCAB, (6, 9))
    mask = torch.arange(9) < torch.tensor([9, 2, 5, 9, 1, 7])[:, None]
    own = model(input_ids=tokens, attention_mask=mask.long(), output_router_logits=True).aux_loss
    router = router_loss_of(model)
    assert router is not None
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    routed = [model(input_ids=tokens[part], use_cache=False).router_logits for part in parts]
    counts = torch.stack([router.count(logits, mask[part]) for logits, part in zip(routed, parts, strict=True)]).sum(0)
    ours = sum(router.of_part(logits, mask[part], counts) for logits, part in zip(routed, parts, strict=True))
    assert isinstance(ours, Tensor)
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)
    for found, expected in zip(gradient(model, ours), gradient(model, own), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_step_is_that_of_plain_transformers_on_the_whole_batch(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run", student={"config": MIXTRAL}, train={"steps": 1, "alpha": 0.0})
    train(config)
    record = next(record for record in read_metrics(tmp_path / "run") if "loss" in record)
    with open_run(config) as run:
        batch = run.reader.read(run.order.take(0, 8))
    model, _ = build_student(config.student, seed=0, vocab_size=VOCAB, row_tokens=12)
    labels = batch.tokens.masked_fill(~batch.real, -100)
    out = model(input_ids=batch.tokens, attention_mask=batch.real.long(), labels=labels, output_router_logits=True)
    assert record["router_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(record["ce"] + 10 * record["router_loss"], rel=1e-6)
    assert record["grad_norm"] == pytest.approx(get_total_norm(gradient(model, out.loss)).item(), rel=1e-4)


def test_micro_batches_and_a_resume_change_nothing(root: Path, tmp_path: Path) -> None:
    student = {"config": {**MIXTRAL, "router_jitter_noise": 0.1, "attention_dropout": 0.1}}
    plain = {"config": MIXTRAL}
    for name, size in (("one", 1), ("eight", 8)):
        train(config_of(root, tmp_path / name, student=plain, train={"micro_batch_rows": size, "steps": 3}))
    one, eight = (
        [(record["loss"], record["router_loss"]) for record in read_metrics(tmp_path / name) if "loss" in record]
        for name in ("one", "eight")
    )
    assert one[0] == pytest.approx(eight[0], rel=1e-5)
    train(config_of(root, tmp_path / "straight", student=student, train={"steps": 4, "schedule_steps": 4}))
    for steps in (2, 4):
        train(config_of(root, tmp_path / "resumed", student=student, train={"steps": steps, "schedule_steps": 4}))
    straight, resumed = (
        [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]
        for name in ("straight", "resumed")
    )
    assert straight == resumed


def test_without_it_nothing_is_added(root: Path, tmp_path: Path) -> None:
    off = {key: value for key, value in MIXTRAL.items() if key not in ROUTED}
    train(config_of(root, tmp_path / "off", student={"config": off}, train={"steps": 1}))
    assert all("router_loss" not in record for record in read_metrics(tmp_path / "off"))


def test_a_model_without_a_router_loss_is_refused(root: Path, tmp_path: Path) -> None:
    llama4 = {**STUDENT, "model_type": "llama4_text", "head_dim": 16, "num_key_value_heads": 1, "num_local_experts": 2}
    with pytest.raises(InvalidInput, match="model_type 'llama4_text' has no router loss; leave it out"):
        train(config_of(root, tmp_path / "run", student={"config": {**llama4, "output_router_logits": True}}))
