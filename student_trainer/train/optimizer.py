"""AdamW and its learning rate."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from potstill.cache.plurals import counted
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import read_config
from potstill.student_trainer.train.settings import LoopConfig

_LOG = logging.getLogger(__name__)


def learning_rate(step: int, config: LoopConfig) -> float:
    """The learning rate of the optimizer step that follows `step` steps.

    Linear warm-up, then `cosine` to `min_lr`, or `constant`, or `wsd` (warm-up, stable, decay: constant with
    a linear fall to `min_lr` over the last `decay` share of all steps). A schedule shorter than the run stays at its
    end.
    """
    length = config.schedule_steps or config.steps
    if step < config.warmup:  # step + 1, as a first step at a rate of 0 would be wasted
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = min(1.0, (step - config.warmup) / max(1, length - config.warmup))
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        share = max(0.0, min(1.0, (length - step) / max(1, round(config.decay * length))))
    return config.min_lr + (config.lr - config.min_lr) * share


def schedule_jump(config: TrainConfig, step: int) -> str:
    """Say how the rate jumps where a run goes on at a step under another schedule; else empty.

    Raises:
        FormatError: the run was written by another version.
    """
    if step < 1 or not (config.run_dir / "config.json").exists():
        return ""
    before, now = read_config(config.run_dir).train, config.train
    rate = learning_rate(step, now)
    if step >= now.steps or math.isclose(rate, learning_rate(step, before)):
        return ""
    lengths = (loop.schedule_steps or loop.steps for loop in (before, now))
    return (
        f"the learning rate jumps from {learning_rate(step - 1, before):.3g} to {rate:.3g} at step {step + 1}: the "
        f"{now.schedule} schedule was of {' and is of '.join(counted(length, 'step') for length in lengths)}; "
        "train.schedule_steps keeps its length"
    )


def warn_of_jump(config: TrainConfig, step: int) -> None:
    """Log what `schedule_jump` has to say."""
    told = schedule_jump(config, step)
    if told:
        _LOG.warning(told)


def make_optimizer(student: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices, not on norms and biases.

    On a GPU it is the fused one, whatever the optimizer was whose state it gets. That was not run on one.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for p in parameters) or None
    there = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(there, lr=config.lr, betas=config.betas, fused=fused)

    def stay(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # Of a device, not of a run: a state brings along how its own optimizer computed.
        return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(stay)
    return optimizer
