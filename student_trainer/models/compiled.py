"""Layers of a student that `torch.compile` compiles, each by itself: they are alike, and one compilation serves all.

What is around them stays as it is: masks of packed rows depend on the data, and the last layer is fused with the loss.
This was run on CPUs, not on a GPU.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.parallel.fsdp import repeated_layers


def compile_layers(student: PreTrainedModel, device: torch.device, *, backend: str = "inductor") -> None:
    """Compile the layers in place, for rows of any number and length on a device.

    Raises:
        InvalidInput: torch cannot compile here, or the student has no layers in a list.
    """
    _check_compiles(backend, device)
    layers = list(repeated_layers(student))
    if not layers:
        raise InvalidInput(
            f"train.compile is true, but model_type {student.config.model_type!r} has no list of layers; leave it out"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def _check_compiles(backend: str, device: torch.device) -> None:
    """Compile as little as there is: what lacks is known before a run begins, not in the middle of its first step."""
    try:
        torch.compile(torch.sin, dynamic=True, backend=backend)(torch.zeros(2, device=device))
    except (RuntimeError, OSError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InvalidInput(f"train.compile is true, but torch cannot compile here: {first}; leave it out") from error
