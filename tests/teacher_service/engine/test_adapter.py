"""Adapters' folders: what their identity is of, and those that vLLM cannot add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput
from potstill.teacher_service.engine.adapter import Adapter
from potstill.teacher_service.engine.vllm_teacher import VllmOptions, VllmTeacher
from tests.support.tiny_models import TARGETS, make_adapter


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tuned", tiny_llama)


def copy_of(adapter: Path, folder: Path, **more: Any) -> Path:
    """A copy with other keys in its configuration."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    config = {**json.loads((adapter / "adapter_config.json").read_text()), **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def found(folder: Path, base: str = "") -> Adapter:
    adapter = Adapter.find(str(folder), base)
    assert adapter is not None
    return adapter


def test_an_adapter_names_its_base_and_modules(adapter: Path, tiny_llama: Path) -> None:
    read = found(adapter)
    assert (read.base, read.room, read.modules) == (str(tiny_llama), 8, tuple(sorted(TARGETS)))
    assert found(adapter, "another/base").base == "another/base"


def test_a_model_folder_is_no_adapter(tiny_llama: Path) -> None:
    assert Adapter.find(str(tiny_llama), "") is None
    assert Adapter.find("some/hub-name", "") is None
    with pytest.raises(InvalidInput, match=r"base is 'x', but 'some/hub-name' is no adapter"):
        Adapter.find("some/hub-name", "x")


def test_the_hash_is_of_what_changes_numbers(adapter: Path, tmp_path: Path) -> None:
    ours = found(adapter).sha256
    moved = copy_of(adapter, tmp_path / "moved", base_model_name_or_path="elsewhere", inference_mode=True, r=4.0 // 1)
    assert found(copy_of(adapter, tmp_path / "plain")).sha256 == ours
    (moved / "adapter_config.json").write_text((moved / "adapter_config.json").read_text().replace("4.0", "4"))
    assert found(moved).sha256 == ours
    assert found(copy_of(adapter, tmp_path / "stronger", lora_alpha=24)).sha256 != ours
    other = copy_of(adapter, tmp_path / "other")
    data = bytearray((other / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "adapter_model.safetensors").write_bytes(data)
    assert found(other).sha256 != ours


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"peft_type": "IA3"}, "is of peft_type 'IA3', not LORA"),
        ({"r": 1000}, "has rank 1000; vLLM takes 1 to 512"),
        ({"r": None}, "has rank None"),
        ({"use_dora": True}, "has DoRA or biases"),
        ({"bias": "all"}, "has DoRA or biases"),
        ({"init_lora_weights": "pissa"}, "was begun by 'pissa'"),
    ],
)
def test_what_vllm_does_not_add_is_to_be_merged(
    adapter: Path, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        found(copy_of(adapter, tmp_path / "it", **more))
    assert refusal.value.detail.startswith(f"the adapter 'it' {reason}")
    assert (
        "; merge it first: peft's PeftModel.from_pretrained(base, adapter).merge_and_unload()" in refusal.value.detail
    )


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (["base_model.model.lm_head.lora_A.weight"], "changes lm_head, which vLLM does not add"),
        (["base_model.model.model.embed_tokens.lora_embedding_A"], "changes base_model.model.model.embed_tokens.lora"),
        (["base_model.model.lm_head.weight"], "changes base_model.model.lm_head.weight"),
        ([], "has no adapter_model.safetensors"),
    ],
)
def test_weights_that_are_not_of_the_layers_are_to_be_merged(
    adapter: Path, tmp_path: Path, weights: list[str], reason: str
) -> None:
    from safetensors.numpy import save

    folder = copy_of(adapter, tmp_path / "it")
    (folder / "adapter_model.safetensors").unlink()
    if weights:
        import numpy as np

        data = save({name: np.zeros((4, 4), np.float32) for name in weights})
        (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(InvalidInput, match=f"the adapter 'it' {reason}"):
        found(folder)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("adapter_config.json", b"{", "it/adapter_config.json is not JSON"),
        ("adapter_config.json", b"[]", "it/adapter_config.json is not a JSON object"),
        ("adapter_config.json", b"{}", "the adapter_config.json of 'it' names no base model; give the option base"),
        ("adapter_model.safetensors", b"\xff" * 64, "adapter_model.safetensors of 'it' cannot be read"),
        ("adapter_model.safetensors", b"\x02" + b"\0" * 7 + b"[]", "the adapter 'it' has no adapter_model.safetensors"),
    ],
)
def test_files_that_are_none_are_named(adapter: Path, tmp_path: Path, name: str, content: bytes, line: str) -> None:
    folder = copy_of(adapter, tmp_path / "it")
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=line):
        found(folder)


async def test_a_base_that_is_not_there_is_refused_before_the_engine_starts(adapter: Path, tmp_path: Path) -> None:
    moved = copy_of(adapter, tmp_path / "it", base_model_name_or_path="/no/such/base")
    with pytest.raises(InvalidInput, match="there is no model folder '/no/such/base'"):
        await VllmTeacher.open(VllmOptions(model=str(moved)))
