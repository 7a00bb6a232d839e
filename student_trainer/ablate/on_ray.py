"""Runs of an ablation as Ray tasks beside each other, as many at a time as have room.

A task whose process is killed is started again by Ray, and its run goes on from its newest checkpoint. A wish to stop
is a file in the ablation's folder, which all tasks see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.ablate.asked import Asked
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.outcome import Failure, Outcome
from potstill.student_trainer.ablate.runs import Run, run_here
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.launch.ray import connected, keys_of

STOP_FILE = ".stop"
_POLL_SECONDS = 0.5


def run_on_ray(
    runs: Sequence[Run],
    grid: GridConfig,
    *,
    address: str | None,
    should_stop: Callable[[], bool],
    while_waiting: Callable[[], None],
) -> Iterator[Outcome | Failure]:
    """Train runs side by side, and give what became of each as it ends; of those that were stopped, nothing.

    Args:
        runs: those to train or go on with.
        grid: the ablation.
        address: of a Ray cluster; None uses the Ray this process is connected to, or starts one on this machine.
        should_stop: asked twice a second; then the runs write checkpoints and end.
        while_waiting: called twice a second.

    Raises:
        InvalidInput: no node of the cluster has room for one run.
    """
    out = Path(grid.out).absolute()
    stop_file = out / STOP_FILE
    out.mkdir(parents=True, exist_ok=True)
    stop_file.unlink(missing_ok=True)
    with connected(address, 1):
        _require_room(grid)
        task = ray.remote(num_cpus=grid.cpus, num_gpus=grid.gpus, max_retries=grid.max_failures)(_task(out))
        waiting = {
            task.remote(run.cell, run.seed, run.config.to_json(), run.base.to_json(), run.asked, keys_of(run.base)): run
            for run in runs
        }
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=_POLL_SECONDS)
            for reference in ended:
                found = _result(reference, waiting.pop(reference))
                if found is not None:
                    yield found
            while_waiting()
            if should_stop() and not stop_file.exists():
                stop_file.touch()
    stop_file.unlink(missing_ok=True)


def _task(out: Path) -> Callable[..., Outcome | Failure | None]:
    """Make the function that Ray calls in a process of its own for each run."""

    def trained(
        cell: str,
        seed: int,
        config: Mapping[str, Any],
        base: Mapping[str, Any],
        asked: Asked | None,
        keys: Mapping[str, str],
    ) -> Outcome | Failure | None:
        import os  # noqa: PLC0415 -- the function is sent whole

        os.environ.update(keys)
        stop_file = out / STOP_FILE
        if stop_file.exists():
            return None
        run = Run(cell, seed, TrainConfig.of(config), TrainConfig.of(base), asked)
        return run_here(run, out, stop_file.exists, lambda _: None)

    return trained


def _result(reference: Any, run: Run) -> Outcome | Failure | None:
    """Read what a task gave; None of a run that was stopped."""
    try:
        found: Outcome | Failure | None = ray.get(reference)
    except RayTaskError as error:
        lines = str(error).strip().splitlines()
        return Failure(run.cell, run.seed, lines[-1] if lines else type(error).__name__)
    except RayError as error:
        return Failure(run.cell, run.seed, f"its process was killed: {str(error).strip().splitlines()[0]}")
    return found


def _require_room(grid: GridConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= grid.cpus and node.get("GPU", 0) >= grid.gpus for node in nodes):
        most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes[:8])
        raise InvalidInput(
            f"a run is to have {grid.cpus:g} CPUs and {grid.gpus:g} GPUs, which no node has ({most}); "
            "lower cpus or gpus"
        )
