"""Places for the numbers of a run beside its own records: TensorBoard, and W&B and MLflow where they are asked for.

These two take project, address and keys from their own environment variables, like `WANDB_PROJECT` and
`MLFLOW_TRACKING_URI`. Neither is imported unless `train.trackers` names it. A run that goes on is found there by the id
in `<run>/trackers.json`. The calls were tested with stand-ins of the two packages, not with the services.
"""

from __future__ import annotations

import importlib
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.leaves import leaves
from potstill.student_trainer.config.run_folder import write_json

_IDS = "trackers.json"
_LONGEST = 500
"""Characters of a parameter that every version of MLflow takes."""
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """One such place."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step, by name."""

    def close(self) -> None:
        """End."""


def open_trackers(config: TrainConfig, *, step: int) -> list[Tracker]:
    """Open TensorBoard's files, which get the steps after `step` anew, and what the config names. The caller closes.

    Raises:
        InvalidInput: a package is not installed.
    """
    modules = {name: _module(name) for name in config.train.trackers}
    found: list[Tracker] = [TensorBoard(config.run_dir, step=step)]
    if not modules:
        return found
    file = config.run_dir / _IDS
    ids: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, module in modules.items():
        ids[name], tracker = (_wandb if name == "wandb" else _mlflow)(module, config, ids.get(name))
        found.append(tracker)
    write_json(file, ids)
    return found


class TensorBoard:
    """The files in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Begin after `step`: what is there of later steps is hidden."""
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step, by name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._board.close()


class Wandb:
    """A run of W&B, which keeps what it cannot send, and sends it later."""

    def __init__(self, run: Any) -> None:
        """Take what `wandb.init` gives."""
        self._run = run
        # By our own steps: steps that are taken again after a crash would be dropped by its own.
        run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step, by name."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """End the run's process there."""
        self._run.finish()


class Mlflow:
    """The active run of MLflow; a server that does not answer is told of once, and costs its numbers only."""

    def __init__(self, module: Any) -> None:
        """Take the package, which has a run that is active."""
        self._mlflow, self._failed = module, False

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step, by name."""
        try:
            self._mlflow.log_metrics(dict(values), step=step)
        except self._mlflow.exceptions.MlflowException as error:
            if not self._failed:
                _LOG.warning("MLflow does not take the numbers of step %d: %s", step, error)
            self._failed = True

    def close(self) -> None:
        """End the run there."""
        self._mlflow.end_run()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"train.trackers has {name!r}, but the package {error.name!r} is not installed; install it, or leave it out"
        ) from error


def _wandb(module: Any, config: TrainConfig, run_id: str | None) -> tuple[str, Tracker]:
    run_id = run_id or uuid.uuid4().hex[:8]
    folder = str(config.run_dir)
    run = module.init(id=run_id, resume="allow", name=config.run_dir.name, dir=folder, config=config.to_json())
    return run_id, Wandb(run)


def _mlflow(module: Any, config: TrainConfig, run_id: str | None) -> tuple[str, Tracker]:
    run = module.start_run(run_id=run_id, run_name=config.run_dir.name)
    if run_id is None:
        module.log_params({name: str(value)[:_LONGEST] for name, value in leaves(config.to_json())})
    return str(run.info.run_id), Mlflow(module)
