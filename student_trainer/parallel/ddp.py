"""Workers that each have the whole student and average their gradients: `DistributedDataParallel`."""

from __future__ import annotations

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from potstill.student_trainer.parallel.group import Group


class DdpGroup(Group):
    """This worker and its peers, whose process group is there already."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device, and wrap."""
        model = model.to(self.device)
        if self.world_size == 1:
            return model
        # Buffers are a causal model's constants, like rotary frequencies: equal on all workers without being sent.
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers in place, on each of them, and return it."""
        distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all workers."""
        distributed.barrier()
