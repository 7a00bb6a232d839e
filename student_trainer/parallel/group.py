"""The workers that train one student together, as the loop sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.cache.errors import InvalidInput


def device_for(asked: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """Choose this process's device: the first GPU, or for `auto` the CPU where there is none.

    Raises:
        InvalidInput: a GPU is asked for, and there is none.
    """
    if asked == "gpu" and not torch.cuda.is_available():
        raise InvalidInput('train.device is "gpu", but torch finds none here; set it to "auto" or "cpu"')
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of one worker, this process; a subclass joins several. All members make the same calls in one order."""

    device: torch.device = field(default_factory=device_for)
    """The device of this worker."""
    rank: int = 0
    """0 to world_size - 1; rank 0 writes files."""
    world_size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device; with several workers, a `DistributedDataParallel` that *averages* gradients."""
        return model.to(self.device)

    def share(self, make: Callable[[], tuple[PreTrainedModel, str]]) -> tuple[PreTrainedModel, str]:
        """Make a student, and the dtype of its checkpoint; where each worker has a part of it, on rank 0 alone."""
        return make()

    def within(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG002 -- of others
        """Make a way through parts of a wrapped module one of its forward passes, in which it has all its weights."""
        return forward

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers in place, on each of them, and return it."""
        return tensor

    def barrier(self) -> None:
        """Wait for all workers."""

    @property
    def in_step(self) -> bool:
        """True where every forward pass is one of all workers together: each must make as many as the others."""
        return False

    def whole_student(self, student: PreTrainedModel) -> PreTrainedModel:
        """The student with all its weights, for rank 0 to write."""
        return student

    def load_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer a whole state, as its `state_dict` has it; raises what `load_state_dict` does."""
        optimizer.load_state_dict(state)
