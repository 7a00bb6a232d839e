"""Randomly initialised small models, made on the spot, for tests that run a real engine or trainer."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

END_OF_TEXT = "<|endoftext|>"


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
