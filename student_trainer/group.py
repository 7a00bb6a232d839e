"""The workers that train one student together, as the loop sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This process alone; a subclass joins several workers. Every member makes the same calls in the same order."""

    device: torch.device = field(default_factory=default_device)
    """The device of this worker."""
    rank: int = 0
    """0 to world_size - 1; rank 0 writes files."""
    world_size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device; with several workers, a `DistributedDataParallel` that *averages* gradients."""
        return model.to(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, on each of them, in place."""
        return tensor

    def barrier(self) -> None:
        """Wait for all workers."""
