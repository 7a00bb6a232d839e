"""Randomly initialised small models, made on the spot, for tests that run a real engine or trainer."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

END_OF_TEXT = "<|endoftext|>"
RANK, ALPHA = 4, 12
TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")


def make_tiny_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """Train a byte-level BPE of `vocab_size` ids (257 or more); the path of `folder/tokenizer.json`."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    text = [topics[name] for name in sorted(topics)[:40]]
    tokenizer.train_from_iterator(
        text, vocab_size=vocab_size, min_frequency=1, special_tokens=[END_OF_TEXT], show_progress=False
    )
    assert tokenizer.get_vocab_size() == vocab_size, "too little text for a vocabulary of this size"
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 512,
    layers: int = 2,
    hidden: int = 64,
    context: int = 256,
) -> Path:
    """Save a Llama with its tokenizer in `folder`, as `transformers` and vLLM load it; the folder.

    Heads have 32 dimensions, the smallest that vLLM's CPU attention takes, so `hidden` is a multiple
    of 32. Weights are wide enough that the next-token distributions are far from flat.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert hidden % 32 == 0, "heads have 32 dimensions"
    make_tiny_tokenizer(folder, vocab_size)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT})
    )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=context,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def make_tiny_lokilm(folder: Path, *, context: int = 256) -> Path:
    """Save a LokiLM with three heads, as `make_tiny_llama` a Llama; the folder."""
    import torch

    from potstill.student_trainer.models.lokilm import LokiLMConfig, LokiLMForCausalLM

    make_tiny_tokenizer(folder)
    sizes = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    config = LokiLMConfig(
        **sizes, num_attention_heads=3, max_position_embeddings=context, initializer_range=0.3, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LokiLMForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, *, merged: Path | None = None, **more: Any) -> Path:
    """Save a random LoRA adapter of `base` as peft does, with the keys `more` in its configuration; the folder.

    `merged` is where the base model with W + alpha / r B A, computed in float64, is saved.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a = torch.randn(RANK, module.in_features, generator=generator) * 0.3
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.3
            weights[f"base_model.model.{name}.lora_A.weight"] = a
            weights[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data = (module.weight.double() + ALPHA / RANK * (b.double() @ a.double())).float()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if merged is not None:
        model.save_pretrained(merged)
    return folder


def make_nested(folder: Path) -> Path:
    """Save an Idefics 3, whose `config.json` says what concerns text, its dtype too, in `text_config`; the folder."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    make_tiny_tokenizer(folder)
    text = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 256, "initializer_range": 0.4}
    text |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Idefics3Config(
        text_config=text, vision_config=vision, image_token_id=511, tie_word_embeddings=False, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("dtype", None)
    saved["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(saved))
    return folder
