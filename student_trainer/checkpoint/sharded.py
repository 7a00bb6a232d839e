"""Sharded checkpoints: each worker writes its own part of every tensor, while the next steps are taken.

    shards/shard-00001-model-00001-of-00001.safetensors   of rank 0, and so on
    model/                                                 config.json and generation_config.json

`torch.distributed.checkpoint` (DCP) plans, writes and reads them, in safetensors: its own format keeps a pickle beside
the tensors, and nothing is unpickled from a checkpoint. Their names are `weights.<name>` and, of the optimizer,
`optimizer.<name>.<state>`; a file's header says which part of a tensor it has, so that any number of workers, or a
process alone, reads what it needs. Nothing of it was run on GPUs.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import PreTrainedModel

from potstill.cache.errors import FormatError, StoreError
from potstill.student_trainer.checkpoint.folders import folder_of, keep_newest, write_state
from potstill.student_trainer.checkpoint.format import TrainState
from potstill.student_trainer.checkpoint.marker import mark
from potstill.student_trainer.checkpoint.replaced import partial_of, take_place
from potstill.student_trainer.parallel.group import Group

SHARDS = "shards"
"""The folder that sharded checkpoints have, and whole ones have not."""


class ShardedCheckpoints:
    """Writes sharded checkpoints below a folder, one at a time, and keeps the newest `keep`. All workers make one."""

    def __init__(self, folder: Path, group: Group, keep: int, published: Callable[[Path], None]) -> None:
        self._folder, self._group, self._keep, self._published = folder, group, keep, published
        # Of its own, as steps use the other one meanwhile; on CPUs, as that is where copies are written from.
        self._peers = distributed.new_group(backend="gloo")
        self._writing: tuple[Future[Any], Path] | None = None

    def save(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Copy this worker's part of all tensors, and begin to write it; see `Checkpoints`."""
        self.wait()
        final = folder_of(self._folder, state.step)
        partial = partial_of(final)

        def publish() -> None:
            (partial / "model").mkdir()
            student.config.save_pretrained(partial / "model")
            if student.generation_config is not None:
                student.generation_config.save_pretrained(partial / "model")
            write_state(state, partial)
            take_place(partial, final, mark)
            keep_newest(final, self._keep)
            self._published(final)

        tensors = {**_weights(student), **_states(student, optimizer)}
        writer = _Writer(partial / SHARDS, publish)
        writing = async_save(tensors, storage_writer=writer, process_group=self._peers)
        assert isinstance(writing, Future), "with this stager it is one future"
        self._writing = writing, final

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            StoreError: as `Checkpoints`, on all workers.
        """
        if self._writing is None:
            return
        (writing, final), self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:
            if self._group.rank == 0:
                shutil.rmtree(partial_of(final), ignore_errors=True)  # a full disk has no room to keep it
            first = next(iter(error.failures.values()))[0]
            if isinstance(first, OSError | SafetensorError | StoreError):
                raise StoreError(f"{str(final)!r} could not be written: {first}") from error
            raise RuntimeError(f"{str(final)!r} could not be written: {first!r}") from error

    def close(self) -> None:
        """Wait until nothing is being written, whatever comes of it: for a run that ends by an error."""
        if self._writing is not None:
            wait([self._writing[0]])
            self._writing = None


class _Writer(HuggingFaceStorageWriter):
    """Writes each worker's part as a file; when all have, rank 0 publishes them."""

    def __init__(self, folder: Path, publish: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._publish = publish

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:  # noqa: ARG002 -- DCP's
        written = {result.storage_data.relative_path for each in results for result in each}
        missing = sorted(name for name in written if not Path(self.path, name).exists())
        if missing:
            raise StoreError(
                f"{missing[0]}, which another worker wrote, is not in {str(self.path)!r}; put train.out where all "
                "workers see it"
            )
        self._publish()


def load_weights(checkpoint: Path, student: PreTrainedModel) -> None:
    """Fill a student, or this worker's part of it, from a sharded checkpoint: bit for bit.

    Raises:
        OSError, ValueError, RuntimeError, SafetensorError: it cannot be loaded.
    """
    _load(_weights(student), checkpoint)


def load_sharded_optimizer(checkpoint: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer this worker's part of its state of a sharded checkpoint; it is read from there alone.

    Raises:
        FormatError: it cannot be read, or is of another student.
    """
    try:
        kept = HuggingFaceStorageReader(str(checkpoint / SHARDS)).read_metadata().state_dict_metadata
        for name, parameter in _trained(student, optimizer):
            found = f"optimizer.{name}."
            state = {
                key.removeprefix(found): _room(value.size, parameter, optimizer)
                for key, value in kept.items()
                if key.startswith(found) and isinstance(value, TensorStorageMetadata)
            }
            if state:
                optimizer.state[parameter] = state
        _load(_states(student, optimizer), checkpoint)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise FormatError(f"{str(checkpoint / SHARDS)!r} cannot be read: {error}") from error


def _load(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Fill tensors in place, or this worker's parts of them."""
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads by itself, as is meant
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error


def _weights(student: PreTrainedModel) -> dict[str, Tensor]:
    """The student's tensors by name; tied ones are one, or they would be written twice."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (f"weights.{name}", tensor.detach()))
    return dict(found.values())


def _trained(student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The parameters that the optimizer has, by name."""
    has = {id(each) for group in optimizer.param_groups for each in group["params"]}
    return [(name, each) for name, each in student.named_parameters() if id(each) in has]


def _states(student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by name; its settings are the run's. Numbers of steps are [1], to be read as slices."""
    return {
        f"optimizer.{name}.{key}": value.view(1) if value.dim() == 0 else value
        for name, parameter in _trained(student, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _room(size: torch.Size, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A tensor for a state of a parameter: of its shape and its parts, or a number of steps."""
    if size == parameter.shape:
        return torch.zeros_like(parameter)
    # A fused AdamW counts steps where the parameter is, any other on the CPU.
    return torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else "cpu")
