"""Workers of a run as processes on gloo, which note the rows that they consume and may be killed inside a save."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from transformers import PreTrainedModel

from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.parallel.ddp import DdpGroup
from potstill.student_trainer.parallel.fsdp import FsdpGroup
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import train

HANG_SECONDS = 60.0
"""Longest time for which the others may go on after one is killed."""

Point = tuple[str, str, str]
"""A call of the system inside a save: an audit event, and how its first path begins and ends, from the run's folder."""


class _Noted:
    """Wraps a group: hashes of the rows of each step that this worker consumes, as lines of JSON."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, list[str]()

    def watch(self, model: nn.Module) -> None:
        student = next(each for each in model.modules() if isinstance(each, PreTrainedModel))

        def note(module: nn.Module, _: tuple[Any, ...], given: dict[str, Any]) -> None:
            if module.training:
                self.rows += map(_hash, _rows(given["input_ids"], given.get("position_ids")))

        student.base_model.register_forward_pre_hook(note, with_kwargs=True)

    def end_of_step(self) -> bool:
        """As `should_stop`, which is asked once a step."""
        with self.file.open("a") as out:
            out.write(json.dumps(self.rows) + "\n")
        self.rows.clear()
        return False


def _rows(tokens: Tensor, positions: Tensor | None) -> Iterable[list[int]]:
    """The rows that share those of the tensors; no token of the tiny corpora has the id 0, which is padding's."""
    for n, row in enumerate(tokens.tolist()):
        begins = [at for at in range(len(row)) if at == 0 or (positions is not None and int(positions[n, at]) == 0)]
        parts = (row[begin:end] for begin, end in zip(begins, [*begins[1:], len(row)], strict=True))
        yield from (part for part in ([token for token in each if token] for each in parts) if part)


def _hash(row: list[int]) -> str:
    return sha256(json.dumps(row).encode()).hexdigest()[:16]


def noting(base: type[Group], noted: _Noted) -> type[Group]:
    """A group like `base`, whose student's rows are noted."""

    class Noting(base):  # type: ignore[misc, valid-type]
        def wrap(self, model: nn.Module) -> nn.Module:
            wrapped: nn.Module = super().wrap(model)
            noted.watch(wrapped)
            return wrapped

    return Noting


def train_alone(config: TrainConfig, file: Path) -> None:
    """Train in this process, with its rows noted."""
    noted = _Noted(file)
    train(config, noting(Group, noted)(device=torch.device("cpu")), should_stop=noted.end_of_step)


def _work(rank: int, size: int, value: dict[str, Any], folder: Path, point: Point | None) -> None:
    torch.set_num_threads(1)
    config = TrainConfig.of(value)
    if point is not None:
        sys.addaudithook(_killed_at(point, str(config.run_dir)))
    timeout = timedelta(seconds=HANG_SECONDS)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size, timeout=timeout
    )
    noted = _Noted(folder / f"rank-{rank}.jsonl")
    kind = {"ddp": DdpGroup, "fsdp": FsdpGroup}[config.train.parallel]
    group = noting(kind, noted)(device=torch.device("cpu"), rank=rank, world_size=size)
    train(config, group, should_stop=noted.end_of_step)
    distributed.destroy_process_group()


def _killed_at(point: Point, run_dir: str) -> Callable[[str, tuple[Any, ...]], None]:
    event, begin, end = point

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event or not isinstance(arguments[0], str | os.PathLike):
            return
        path = str(arguments[0]).removeprefix(f"{run_dir}/checkpoints/")
        if path.startswith(begin) and path.endswith(end) and (name != "open" or "w" in (arguments[1] or "")):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone; an engine of vLLM in this process has made one already."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def train_together(
    config: TrainConfig, size: int, folder: Path, *, point: Point | None = None, victim: int = 0
) -> list[int | None]:
    """Train with `size` workers of which one is killed at a point; return their exit codes, None for one that hangs.

    Rows are noted in `folder / "rank-<n>.jsonl"`.
    """
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that a worker starts in no time
    value = config.to_json()
    workers = [
        context.Process(target=_work, args=(rank, size, value, folder, point if rank == victim else None))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    workers[victim].join()
    for worker in workers:
        worker.join(HANG_SECONDS)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    return codes
