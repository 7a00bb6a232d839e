"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from potstill.student_trainer.config import LoopConfig


def learning_rate(step: int, config: LoopConfig) -> float:
    """The learning rate of the optimizer step that follows `step` steps.

    Linear warm-up, then `cosine` to `min_lr`, or `constant`, or `wsd` (warm-up, stable, decay: constant with
    a linear fall to `min_lr` over the last `decay` share of all steps).
    """
    if step < config.warmup:  # step + 1, as a first step at a rate of 0 would be wasted
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        share = min(1.0, (config.steps - step) / max(1, round(config.decay * config.steps)))
    return config.min_lr + (config.lr - config.min_lr) * share


def make_optimizer(student: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices, not on norms and biases."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)
