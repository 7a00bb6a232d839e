"""Workers that share a student's weights, gradients and optimizer state among them: FSDP2's `fully_shard`.

Each has a part of every tensor, and a layer's weights come together on all of them while it computes: a student that
does not fit one GPU trains on several. Each writes its part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from potstill.student_trainer.parallel.ddp import DdpGroup


def group_class(parallel: Literal["ddp", "fsdp"]) -> type[DdpGroup]:
    """The group that `train.parallel` names."""
    return {"ddp": DdpGroup, "fsdp": FsdpGroup}[parallel]


class FsdpGroup(DdpGroup):
    """This worker and its peers, which must make the same forward passes together."""

    @property
    def in_step(self) -> bool:
        """True: every forward pass gathers weights from all workers."""
        return True

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard the model in place, layer by layer, onto the device; gradients come *averaged*."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for layer in repeated_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def within(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Gather the module's own weights, as of its embedding and head, for `forward`; their gradients are shared."""
        module.forward_of_parts = forward  # type: ignore[assignment]
        register_fsdp_forward_method(module, "forward_of_parts")
        return cast("Callable[..., Any]", module.forward_of_parts)

    def whole_student(self, student: PreTrainedModel) -> PreTrainedModel:
        """Gather the weights: on rank 0 a copy of the student on the CPU; elsewhere the sharded one."""
        gathered: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in student.state_dict(keep_vars=True).items():
            # Tied weights stay one tensor, or they would be written twice.
            if id(tensor) not in gathered:
                gathered[id(tensor)] = self._whole(tensor)
            state[name] = gathered[id(tensor)]
        if self.rank != 0:
            return student
        plain: Any = next(each for each in type(student).__mro__ if not issubclass(each, FSDPModule))
        with torch.device("meta"):
            whole: PreTrainedModel = plain(student.config)
        whole.load_state_dict(state, assign=True)
        whole.generation_config = student.generation_config
        return whole

    def load_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer this worker's part of a whole state, which every worker has read."""
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        found = {
            index: {name: _part(value, parameters[index]) for name, value in one.items()}
            for index, one in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": found})

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor().detach()
        return whole.cpu() if self.rank == 0 else whole[:0]


def repeated_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that repeat: those in lists which are in no such list themselves."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_layers(child)


def _part(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
