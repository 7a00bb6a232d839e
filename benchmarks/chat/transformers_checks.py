"""Checks of a student's folder by `transformers` alone, beside its teacher's folder.

Each gives a line that says what was found, or raises AssertionError with what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.chat.conversations import Message

Loaded = tuple[Any, Any]
"""A tokenizer and a model, as the Auto classes load them."""

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
PADDED_BOUND = 1e-4
"""Largest difference of a logit that another order of float32 sums explains."""


def load(folder: Path) -> Loaded:
    """Load a folder as its users do, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def special_tokens(student: Loaded, teacher: Any) -> str:
    """Compare special tokens by name and id, in the tokenizer, the model's config and that of generation."""
    tokenizer, model = student
    assert tokenizer.special_tokens_map == teacher.special_tokens_map, tokenizer.special_tokens_map
    for name in SPECIAL:
        ids = {getattr(holder, name) for holder in (teacher, tokenizer, model.config, model.generation_config)}
        assert len(ids) == 1, (name, ids)
    weights = sum(weight.numel() for weight in model.parameters())
    tokens = ", ".join(f"{name[:3]} {getattr(tokenizer, name.removesuffix('_id'))!r}" for name in SPECIAL)
    return f"{type(model).__name__} of {weights / 1e6:.2f} million weights; {tokens}, the teacher's"


def chat_template(student: Loaded, teacher: Any, talks: list[list[Message]]) -> str:
    """Compare the ids of whole conversations and of prompts with the teacher's."""
    for talk in talks:
        for messages, prompt in ((talk, False), (talk[:-1], True)):
            ids, expected = (prompt_ids(each, messages, prompt=prompt) for each in (student[0], teacher))
            assert ids == expected, messages
    return f"ids of {len(talks)} conversations and as many prompts are the teacher's"


def padded_batch(student: Loaded, prompts: list[list[Message]]) -> str:
    """Compare the logits of a padded batch with those of each row alone, padded on either side."""
    tokenizer, model = student
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    worst = 0.0
    for side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            together = model(**batch).logits
            for row, mask, logits in zip(rows, batch["attention_mask"].bool(), together, strict=True):
                alone = model(torch.tensor([row])).logits[0]
                worst = max(worst, float((logits[mask] - alone).abs().max()))
    assert worst <= PADDED_BOUND, worst
    lengths = " and ".join(str(len(row)) for row in rows)
    return f"rows of {lengths} tokens, padded on either side: logits at most {worst:.1e} from each alone"


def generation(student: Loaded, prompts: list[list[Message]], limit: int = 24) -> str:
    """Generate from each chat prompt, and from all as a padded batch, and compare."""
    tokenizer, model = student
    alone = [greedy(student, prompt_ids(tokenizer, prompt), limit) for prompt in prompts]
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    found = model.generate(**batch, do_sample=False, max_new_tokens=limit)[:, batch["input_ids"].shape[1] :]
    together = [_to_end(ids, tokenizer.eos_token_id) for ids in found.tolist()]
    assert together == alone, (together, alone)
    ended = sum(ids[-1] == tokenizer.eos_token_id for ids in alone)
    told = f"{ended} of {len(alone)} answers end by {tokenizer.eos_token!r}, others after {limit} tokens"
    return f"{told}; padded the same; the first begins {tokenizer.decode(alone[0][:6])!r}"


def greedy(student: Loaded, ids: list[int], limit: int) -> list[int]:
    """Generate up to `limit` ids after a prompt, the most probable each time, with the one that ends them."""
    tokenizer, model = student
    found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=limit)
    return _to_end(found[0, len(ids) :].tolist(), tokenizer.eos_token_id)


def prompt_ids(tokenizer: Any, messages: list[Message], *, prompt: bool = True) -> list[int]:
    """Write messages by the tokenizer's chat template; with `prompt`, up to where the assistant begins."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    return ids


def _to_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
