"""A student's folder in vLLM's CPU engine, as its users start it, against `transformers`."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.chat.conversations import Message
from benchmarks.chat.transformers_checks import Loaded, greedy, prompt_ids

SCORE_BOUND = 1e-3
"""Nats; two float32 implementations of one model."""


def in_vllm(folder: Path, student: Loaded, prompts: list[list[Message]], limit: int = 24) -> str:
    """Chat with vLLM, and compare its prompts, answers and logprobs with those of `transformers`."""
    from vllm import LLM, SamplingParams

    size = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 28}
    engine = LLM(str(folder), dtype="float32", enforce_eager=True, disable_log_stats=True, **size)
    how = SamplingParams(temperature=0, max_tokens=limit, prompt_logprobs=0)
    outputs = engine.chat(prompts, how, use_tqdm=False)
    worst, same, count = 0.0, 0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt_ids(student[0], prompt)
        assert list(output.prompt_token_ids or ()) == ids, "vLLM wrote another prompt"
        answer, expected = list(output.outputs[0].token_ids), greedy(student, ids, limit)
        assert answer[0] == expected[0], (answer, expected)
        same += sum(a == b for a, b in zip(answer, expected, strict=False))
        count += len(expected)
        with torch.no_grad():
            dense = student[1](torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = [next(iter(each.values())).logprob for each in (output.prompt_logprobs or [])[1:] if each]
        plain = dense[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        worst = max(worst, float((plain - torch.tensor(scored)).abs().max()))
    assert worst <= SCORE_BOUND, worst
    return (
        f"{len(prompts)} of {len(prompts)} greedy next tokens are those of transformers, {same} of {count} tokens of "
        f"the answers; logprobs of the prompts at most {worst:.1e} nats off"
    )
