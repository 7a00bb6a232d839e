"""The place of each worker on the nodes of a cluster: how many CPUs, and a GPU or none. Nothing here needs Ray.

A worker lies on one node, so what counts is not the cluster's sum but how many workers fit on each node. What can never
be placed is refused here: Ray would wait for it, silently and for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.student_trainer.config import TrainConfig

_NAMED = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster, with all that it has, in use or not."""

    name: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """The resources of every worker."""

    cpus: int
    gpu: bool


def place(nodes: Sequence[Node], workers: int, device: Literal["auto", "cpu", "gpu"]) -> Placement:
    """Choose the most CPUs with which so many workers fit on the nodes; with a GPU each, one.

    Args:
        nodes: those of the cluster that are alive.
        workers: how many.
        device: `train.device`; `auto` is `gpu` where any node has one.

    Raises:
        InvalidInput: they fit in no way.
    """
    if device == "gpu" or (device == "auto" and any(int(node.gpus) for node in nodes)):
        room = sum(int(min(node.gpus, node.cpus)) for node in nodes)
        if room < workers:
            raise InvalidInput(
                f"{_told(nodes, workers)}: room for {room} with a GPU and a CPU each; lower train.workers, add nodes, "
                'or set train.device to "cpu"'
            )
        return Placement(cpus=1, gpu=True)
    most = int(max((node.cpus for node in nodes), default=0))
    fitting = (cpus for cpus in range(most, 0, -1) if sum(int(node.cpus // cpus) for node in nodes) >= workers)
    cpus = next(fitting, 0)
    if not cpus:
        raise InvalidInput(f"{_told(nodes, workers)}: less than a CPU for each; lower train.workers, or add nodes")
    return Placement(cpus=cpus, gpu=False)


def place_some(nodes: Sequence[Node], workers: tuple[int, int], device: Literal["auto", "cpu", "gpu"]) -> Placement:
    """Choose the resources of each of as many workers as fit on the nodes, from the least to the most.

    Raises:
        InvalidInput: not even the least fit in any way.
    """
    for number in range(workers[1], workers[0], -1):
        with suppress(InvalidInput):
            return place(nodes, number, device)
    return place(nodes, workers[0], device)


def check_one_machine(config: TrainConfig, machines: int) -> None:
    """Check that the workers of a run in an object store share the folder that is its copy.

    Raises:
        InvalidInput: they are on several machines.
    """
    if config.in_store and machines > 1:
        raise InvalidInput(
            f"train.out is {config.train.out!r}, but the workers are on {machines} machines, which share no copy of "
            "it; set it to a folder that all of them see"
        )


def _told(nodes: Sequence[Node], workers: int) -> str:
    named = ", ".join(f"{node.name} {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes[:_NAMED])
    others = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return f"{counted(workers, 'worker')} cannot be placed on {counted(len(nodes), 'node')} ({named}{others})"
