"""Workers that share a student's weights, gradients and optimizer state among them: FSDP2's `fully_shard`.

Each has a part of every tensor, and a layer's weights come together on all of them while it computes: a student that
does not fit one GPU trains on several. Each writes its part of a checkpoint.

Rank 0 makes the student, on its CPU, and is the only one that ever has all of it: the others get it without weights,
on `meta`, and all shard that. Then the weights go round one tensor at a time, of which each keeps its part; no device
holds more than its parts and one tensor. That was run on CPUs, not on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import swap_tensors
from transformers import PreTrainedModel

from potstill.cache.errors import PotstillError
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

    def share(self, make: Callable[[], tuple[PreTrainedModel, str]]) -> tuple[PreTrainedModel, str]:
        """Make a student on rank 0's CPU, and give each worker its part, on its device; else as of `Group`.

        Raises:
            PotstillError: what `make` raised, on all workers.
        """
        told: list[Any] = [None]
        whole: list[Tensor | None] = []
        if self.rank == 0:
            try:
                told = [make()]
                whole = _weights_taken(told[0][0])
            except PotstillError as error:
                told = [error]
        # As it was made, not made again from its config: a checkpoint may say which weights are tied.
        distributed.broadcast_object_list(told, device=self.device)
        if isinstance(told[0], PotstillError):
            raise told[0]
        student, stored = told[0]
        self.wrap(student)
        tensors = _tensors(student)
        for mine, sent in zip(tensors, whole or [None] * len(tensors), strict=True):
            self._fill(mine, sent)
        return student, stored

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

    def _fill(self, mine: Tensor, whole: Tensor | None) -> None:
        """Fill a buffer on `meta`, or this worker's part of a parameter, from the whole one, which rank 0 has."""
        if whole is None:
            sent = torch.empty(mine.shape, dtype=mine.dtype, device=self.device)
        else:
            sent = whole.detach().to(self.device)
        distributed.broadcast(sent, 0)
        swap_tensors(mine, _like(mine, _part(sent, mine)))  # type: ignore[no-untyped-call]

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


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in one order for all workers; tied ones are one."""
    return [*model.parameters(), *model.buffers()]


def _weights_taken(student: nn.Module) -> list[Tensor | None]:
    """Leave the student on `meta`, and return the tensors that it had."""
    taken: list[Tensor | None] = []
    for mine in _tensors(student):
        other = _like(mine, torch.empty_like(mine, device="meta"))
        swap_tensors(mine, other)  # type: ignore[no-untyped-call]  # not replaced: it may be tied
        taken.append(other)
    return taken


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Make the value a parameter if the tensor is one, else a copy, which no message still refers to."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value.detach(), requires_grad=tensor.requires_grad)
    return value.clone()


def _part(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        placed = value if parameter.is_meta else value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
