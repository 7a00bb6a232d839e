"""A run under `torchrun`, which starts the workers on one or more machines; `potstill train` has Ray do that.

    torchrun --nproc-per-node 2 -m potstill.student_trainer.launch.torchrun CONFIG.toml [--out DIR]

There are as many workers as torchrun starts, whatever `train.workers` is. With `--max-restarts` torchrun starts them
again from the newest checkpoint, after an error of any kind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import distributed

from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.plurals import counted
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.launch.ending import tell_end
from potstill.student_trainer.launch.placement import check_one_machine
from potstill.student_trainer.metrics.progress import begun, showing
from potstill.student_trainer.parallel.ddp import DdpGroup
from potstill.student_trainer.parallel.fsdp import group_class
from potstill.student_trainer.parallel.group import device_for
from potstill.student_trainer.train.interrupt import stop_on_signals
from potstill.student_trainer.train.loop import train


def main() -> int:
    """Train as the worker that torchrun started this process to be. 0 when done; 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="potstill.student_trainer.launch.torchrun")
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to train, on what, from whom")
    parser.add_argument("--out", metavar="DIR", help="the run's folder, instead of the config's train.out")
    args = parser.parse_args()
    try:
        return _train(TrainConfig.from_toml(args.config, out=args.out))
    except PotstillError as error:
        print(f"{error.kind}: {error.detail}", file=sys.stderr)  # noqa: T201 -- a command
        return 1


def _train(config: TrainConfig) -> int:
    if not distributed.is_torchelastic_launched():
        raise InvalidInput("this process is no worker of torchrun; start it as `torchrun -m` and the module's name")
    value = config.model_dump()
    config = TrainConfig.of({**value, "train": {**value["train"], "workers": int(os.environ["WORLD_SIZE"])}})
    check_one_machine(config, int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]))
    device = device_for(config.train.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _follow(config, _group(config, device))
    finally:
        distributed.destroy_process_group()


def _group(config: TrainConfig, device: torch.device) -> DdpGroup:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return group_class(config.train.parallel)(device=device, rank=rank, world_size=size)


def _follow(config: TrainConfig, group: DdpGroup) -> int:
    """Train, with progress on rank 0."""
    console = Console(quiet=group.rank != 0)

    def begin(step: int) -> None:
        console.print(begun(step, f"with {counted(group.world_size, 'worker')} of torchrun"), highlight=False)

    with stop_on_signals() as stop, showing(config.train.steps, console) as show:
        result = train(config, group, should_stop=stop, on_record=show, on_begin=begin)
    if group.rank == 0:
        tell_end(result, config)
    return 0 if result.finished else 128 + stop.signal_number


if __name__ == "__main__":
    sys.exit(main())
