"""The workers that train one student together, as the loop sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class Group(Protocol):
    """Rank, size and the three collectives the loop needs; every member calls them in the same order."""

    @property
    def rank(self) -> int:
        """0 to world_size - 1; rank 0 writes files."""
        ...

    @property
    def world_size(self) -> int:
        """Number of workers."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device; with several workers, a `DistributedDataParallel` that *averages* gradients."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, on each of them, in place."""
        ...

    def barrier(self) -> None:
        """Wait for all workers."""
        ...


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Alone:
    """A group of one: this process."""

    device: torch.device = field(default_factory=default_device)
    rank: int = 0
    world_size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device."""
        return model.to(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def barrier(self) -> None:
        """Nothing to wait for."""
