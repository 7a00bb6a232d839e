"""Measure LokiLM's ways to attend, and what ALiBi gives on rows longer than those of the training.

    python -m benchmarks.student.bench_alibi [--lengths 512,2048,4096] [--rounds 5] [--steps 1000]

1. Each way at each length in float32 and bfloat16: the largest error against float64 on the same inputs, and the time
   of a forward pass, and of one with its backward pass, over that of SDPA with a mask of numbers; the mask is made
   beforehand. "Only 1 of 3 parts" is the wider keys with less of the bias kept, "no ALiBi" the plain kernel.
2. A small model and a GPT-2 of its size, which learns its positions, trained on rows of 256 tokens of Python's own
   documentation and read on unseen rows of 1,024: loss by position.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.student.attention_ways import MASKED, measured
from potstill.student_trainer.models.lokilm import LokiLMConfig, LokiLMForCausalLM

HEADS, DIMENSIONS = 8, 64
VOCAB, TRAINED, READ = 512, 256, 1024


def print_ways(lengths: list[int], rounds: int) -> None:
    print("| L | dtype | way | largest error | forward | forward and backward |\n|---|---|---|---|---|---|")
    for length in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            results = measured((HEADS, length, DIMENSIONS), dtype, torch.device("cpu"), rounds)
            for name, one in results.items():
                said = one.row(name, results[MASKED])
                print(f"| {length} | {str(dtype).removeprefix('torch.')} | {said}", flush=True)


def tokens_of_topics() -> Tensor:
    """Ids of the documentation's topics [N], by a tokenizer trained on them."""
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    return torch.tensor(tokenizer.encode("\n\n".join(texts)).ids)


def lokilm() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 3}
    return LokiLMForCausalLM(LokiLMConfig(vocab_size=VOCAB, num_attention_heads=3, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 96, "n_layer": 3, "n_head": 3, "n_positions": READ}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **still))
    return model


def trained(make: Callable[[], nn.Module], tokens: Tensor, steps: int) -> Any:
    """Train a model on random windows of 256 tokens."""
    torch.manual_seed(0)
    model: Any = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - TRAINED, (8,), generator=generator)
        rows = torch.stack([tokens[start : start + TRAINED] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return model


def loss_by_position(model: Any, tokens: Tensor) -> Tensor:
    """Mean loss [4] of quarters of rows of 1,024 tokens."""
    rows = tokens[: len(tokens) // READ * READ].reshape(-1, READ)
    with torch.no_grad():
        losses = [
            cross_entropy(model(input_ids=row[None, :-1], use_cache=False).logits[0], row[1:], reduction="none")
            for row in rows
        ]
    mean = torch.stack(losses).mean(dim=0)
    return torch.stack([mean[start : start + TRAINED].mean() for start in range(0, READ, TRAINED)])


def print_extrapolation(steps: int) -> None:
    tokens = tokens_of_topics()
    unseen = len(tokens) // 10 * 9
    print(f"\n{len(tokens):,} tokens, a tenth of them unseen; {steps} steps of 8 rows of {TRAINED}")
    print("| model | parameters | 0-255 | 256-511 | 512-767 | 768-1023 |\n|---|---|---|---|---|---|")
    for name, make in (("LokiLM, ALiBi", lokilm), ("GPT-2, learned positions", gpt2)):
        model = trained(make, tokens[:unseen], steps)
        count = sum(weight.numel() for weight in model.parameters())
        losses = loss_by_position(model, tokens[unseen:])
        print(f"| {name} | {count:,} | " + " | ".join(f"{float(each):.3f}" for each in losses) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048,4096", help="tokens of a row, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of training; 0 leaves the second part out")
    args = parser.parse_args()
    if args.rounds:
        print_ways([int(length) for length in args.lengths.split(",")], args.rounds)
    if args.steps:
        print_extrapolation(args.steps)


if __name__ == "__main__":
    main()
