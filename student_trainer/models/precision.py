"""The precision of forward passes."""

from __future__ import annotations

import torch


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """A context for forward passes in `float32` or `bfloat16`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
