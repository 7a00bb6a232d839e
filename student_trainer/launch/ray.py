"""The training loop on Ray Train: one worker per process, restarted from the newest checkpoint when one dies.

Ray places and restarts the workers and joins them into a process group; everything else is `loop.train`. The
run's folder, the cache and a student's checkpoint must be where every worker sees them. While Ray works, this
process follows `metrics.jsonl` for the caller's progress display, and passes a wish to stop on as a file.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from potstill.cache.errors import PotstillError, Unavailable
from potstill.cache.ray_folder import ray_folder
from potstill.clients.address import API_KEY_VARIABLE
from potstill.student_trainer.checkpoint.folders import newest_checkpoint, step_of
from potstill.student_trainer.checkpoint.stored import bring_run
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.result import TrainResult, finished_before
from potstill.student_trainer.launch.failures import EndOnOurErrors, error_of_ours
from potstill.student_trainer.launch.placement import Node, Placement, check_one_machine, place_some
from potstill.student_trainer.metrics.records import MetricsFollower, Record
from potstill.student_trainer.parallel.fsdp import group_class
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import run_session
from potstill.student_trainer.train.optimizer import warn_of_jump
from potstill.student_trainer.train.run import open_run

_STOP_FILE = ".stop"
_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0
"""Seconds between two looks at the nodes, as long as Ray takes to see that one is to go."""


def train_with_ray(
    config: TrainConfig,
    *,
    address: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] = lambda _: None,
    on_begin: Callable[[int], None] = lambda _: None,
    brought: int | None = None,
) -> TrainResult:
    """Train like `loop.train`, by `config.train.workers` Ray workers.

    Args:
        config: the run.
        address: of a Ray cluster, like `auto` or `ray://host:10001`; None for that of this process, or a new one.
        should_stop: asked twice a second; then the workers write a checkpoint and return.
        on_record: called in this process with every record of `metrics.jsonl`.
        on_begin: called before Ray starts, with the step that the run goes on from, or -1.
        brought: as of `loop.train`.

    Raises:
        PotstillError: as `loop.train`; what cannot work is found before Ray starts, or before any worker does where
            the cluster has no place for them. Only what a restart may mend is tried again.
    """
    config = config.absolute()
    brought = bring_run(config) if brought is None else brought
    if (finished := finished_before(config)) is not None:
        return finished
    with open_run(config):
        pass  # a missing corpus, teacher or shard is an error here, not three restarts later
    stop_file = config.run_dir / _STOP_FILE
    # A file, as the only channel that surely reaches workers on other machines: they share the run's folder anyway.
    stop_file.unlink(missing_ok=True)
    # Chosen here, as workers' warnings are not shown, and records of steps after a damaged one are to be.
    begun = step_of(newest_checkpoint(config.run_dir / "checkpoints", good=brought))
    on_begin(begun)
    warn_of_jump(config, begun)
    follower = MetricsFollower(config.run_dir, after_step=begun)
    with connected(address, config.train.workers_range[1]):
        trainer = _trainer(config, begun)
        fit: Future[TrainResult] = Future()
        # In the main thread `fit` would take over Ctrl-C and abort without a checkpoint.
        threading.Thread(target=_fit, args=(trainer, fit), name="ray-train", daemon=True).start()
        while not fit.done():
            wait([fit], _POLL_SECONDS)
            for record in follower.read():
                on_record(record)
            if should_stop() and not stop_file.exists():
                stop_file.touch()
    stop_file.unlink(missing_ok=True)
    return _result(fit)


def _result(fit: Future[TrainResult]) -> TrainResult:
    try:
        result = fit.result()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    if result.problem:
        raise Unavailable(result.problem)
    return result


def _fit(trainer: ray.train.torch.TorchTrainer, found: Future[TrainResult]) -> None:
    """Train to the end and give `found` what rank 0 returned, or the error."""
    try:
        found.set_result(trainer.fit().return_value)
    except BaseException as error:  # noqa: BLE001 -- carried to the thread that waits, whatever it is
        found.set_exception(error)


class _NodesLeaving:
    """Asks Ray now and then, for all workers, whether nodes are about to be taken away; true once for each."""

    def __init__(self, group: Group) -> None:
        self._group, self._next = group, 0.0
        self._known: set[str] = set()

    def __call__(self) -> bool:
        """Ask. All workers call it after each step, and only rank 0 looks at the clock: Ray waits for all of them."""
        due = torch.tensor(float(self._group.rank == 0 and time.monotonic() >= self._next), device=self._group.device)
        if not self._group.all_reduce_sum(due).item():
            return False
        self._next = time.monotonic() + _ASK_SECONDS
        found = ray.train.get_preemption_info()
        leaving = set() if found is None else set(found.preempted_node_ids) - self._known
        self._known |= leaving
        return bool(leaving)


def _training(keys: Mapping[str, str]) -> Callable[[Mapping[str, Any]], TrainResult]:
    """Make the function that Ray calls in each worker's own process to train as one of a group.

    Args:
        keys: API keys by environment variable. They travel in the function itself: Ray writes a `runtime_env` into its
            logs, and the worker's arguments may be shown.
    """

    def worker(arguments: Mapping[str, Any]) -> TrainResult:
        os.environ.update(keys)
        config = TrainConfig.of(arguments["config"])
        context = ray.train.get_context()
        device, rank, size = ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size()
        group = group_class(config.train.parallel)(device=device, rank=rank, world_size=size)
        stop_file = config.run_dir / _STOP_FILE
        # An error would have Ray start the workers again, to find no service either. The driver has read the newest.
        good, report = arguments["good"], ray.train.report
        return run_session(
            config,
            group,
            should_stop=stop_file.exists,
            on_evaluation=report,
            should_save=_NodesLeaving(group),
            good=good,
        )

    return worker


def keys_of(config: TrainConfig) -> dict[str, str]:
    """Collect the API keys that the run's services are asked with, by environment variable, where they are set."""
    named = (config.data.api_key_env, *(teacher.api_key_env for teacher in config.teachers))
    names = {API_KEY_VARIABLE, *(name for name in named if name is not None)}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _placement(config: TrainConfig) -> Placement:
    """Choose what each worker gets on the nodes of the cluster that this process is connected to."""
    nodes = [
        Node(node["NodeManagerHostname"], *(node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")))
        for node in ray.nodes()
        if node["Alive"]
    ]
    check_one_machine(config, len(nodes))
    return place_some(nodes, config.train.workers_range, config.train.device)


def _trainer(config: TrainConfig, good: int) -> ray.train.torch.TorchTrainer:
    placement = _placement(config)
    # Ray gives a worker as many torch threads as CPUs, and by default one.
    resources = {"CPU": placement.cpus, **({"GPU": 1} if placement.gpu else {})}
    loop = config.train
    # Ray is given no checkpoints, only evaluations: it would copy them, or take them out of our hands.
    failures = ray.train.FailureConfig(
        max_failures=loop.max_failures,
        max_preemption_failures=-1 if loop.max_preemptions is None else loop.max_preemptions,
    )
    return ray.train.torch.TorchTrainer(
        _training(keys_of(config)),
        train_loop_config={"config": config.to_json(), "good": good},
        scaling_config=ray.train.ScalingConfig(
            num_workers=loop.workers, use_gpu=placement.gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"session-{uuid.uuid4().hex[:8]}",
            storage_path=str(config.run_dir / "ray"),
            failure_config=failures,
            callbacks=[EndOnOurErrors()],
            worker_runtime_env=loop.worker_runtime_env,
        ),
    )


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[None]:
    """Connect to Ray for the block; shut it down at the end only if it was connected here."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this Ray packs and uploads the current folder when this was started by `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    cpus = max(workers, os.cpu_count() or 1)  # more workers than cores are slow, not stuck
    started_here: dict[str, Any] = (
        {} if address else {"include_dashboard": False, "num_cpus": cpus, "_temp_dir": ray_folder()}
    )
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **started_here)
    except ConnectionError as error:
        raise Unavailable(f"no Ray at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _cause(error: ray.train.TrainingFailedError) -> PotstillError:
    """Make one error of ours of Ray's."""
    if isinstance(error, ray.train.ControllerError):
        failures: list[Exception] = [error.controller_failure]
    else:
        failures = list(getattr(error, "worker_failures", {}).values())
    ours = next((found for found in map(error_of_ours, failures) if found is not None), None)
    if ours is not None:
        return ours
    first = failures[0] if failures else error
    lines = str(first).strip().splitlines() or [type(first).__name__]
    return PotstillError(f"training workers failed: {lines[-1]}")
