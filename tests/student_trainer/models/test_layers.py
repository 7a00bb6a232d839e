"""Students of some layers of a larger model, held against the larger model with its other layers taken out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.models.layers import keep_layers

V, DEPTH = 50, 6
SIZES = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "vocab_size": V}
LLAMA = {**SIZES, "model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 2}
KINDS: list[dict[str, Any]] = [
    LLAMA,
    {**LLAMA, "tie_word_embeddings": True},
    {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    {**LLAMA, "model_type": "mixtral", "num_local_experts": 3},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "vocab_size": V},
]


def random_model(keys: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**ids, **keys})).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(2 * 9).reshape(2, 9) * 7 % V).logits
    return found


@pytest.mark.parametrize("keys", KINDS, ids=lambda keys: str(keys["model_type"]))
def test_all_layers_are_the_model_and_fewer_are_saved_and_loaded(keys: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(keys)
    assert torch.equal(logits(keep_layers(model, range(DEPTH)).eval()), logits(model))
    student = keep_layers(model, [0, 4, 5]).eval()
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(student))


def test_it_computes_what_the_model_does_without_its_other_layers() -> None:
    model = random_model(LLAMA)
    student = keep_layers(model, [0, 5]).eval()
    layers = model.get_decoder().layers
    for layer in list(layers)[1:5]:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    torch.testing.assert_close(logits(student), logits(model))


def test_layers_keep_their_own_kind_of_attention() -> None:
    model = random_model({**KINDS[2]})
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    assert keep_layers(model, [0, 5]).config.layer_types == [kinds[0], kinds[5]]
    assert model.config.num_hidden_layers == DEPTH, "the larger model stays as it is"


@pytest.mark.parametrize("layer", [-1, DEPTH])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    with pytest.raises(InvalidInput, match=rf"student\.layers has {layer}, but .* has 6 layers; choose from 0 to 5"):
        keep_layers(random_model(LLAMA), [0, layer])


def test_layers_that_differ_from_each_other_are_refused() -> None:
    mixed = {**LLAMA, "model_type": "qwen2_moe", "num_experts": 2, "mlp_only_layers": [0], "moe_intermediate_size": 8}
    model = random_model({**mixed, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1})
    with pytest.raises(InvalidInput, match="whose layers differ from each other"):
        keep_layers(model, [1, 2])
