from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from benchmarks.support.flip_cache import build
from potstill.cache.types import Tokens
from potstill.teacher_service.engine.vllm_teacher import VllmOptions, VllmTeacher
from tests.support import schedule
from tests.support.tiny_models import make_tiny_llama

Forward = Callable[[Tokens], NDArray[np.float32]]

# What vLLM, torch and Ray Serve do on import and start; ours stay errors.
ENGINE_WARNINGS = (
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning",
    "ignore:Unclosed context <zmq.Context:ResourceWarning",
    "ignore:Using extra keyword arguments on `Field` is deprecated:DeprecationWarning",
)


MEMORY, MEMORY_BYTES = Path("/dev/shm"), 2 << 30
"""Where temporary folders go if so many bytes are free there. pytest removes them if no test failed."""

# Timings belong in benchmarks; a busy machine must not fail a property.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Half the time of the cache's tests was fsync; a killed process loses nothing of what is in memory.
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    # Threads of processes that share the cores spin while they wait for each other: half of the time with torch.
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts what is to run in the background with SIGINT ignored, and so would every process of a test be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in ENGINE_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        schedule.check(item)
    items.sort(key=lambda item: schedule.place_of(item.nodeid))


def pytest_collection_finish() -> None:
    # What was imported stays to the end: looking through it for garbage again and again took seconds of each process.
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind tells at the end of what is left


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> schedule.GroupScheduling:
    config.option.loadscopereorder = False  # which would begin with the groups of most tests
    return schedule.GroupScheduling(config, log)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Models as small as these only wait for each other on two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def flip_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with every kind of object in it, to be copied: it is not to be changed."""
    root = tmp_path_factory.mktemp("flips") / "c"
    build(root, archive=False)
    return root


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: Llama, V=512, 256 tokens of context, with its tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", seed=0)


@pytest.fixture(scope="session")
def vllm_teacher(tiny_llama: Path) -> Iterator[VllmTeacher]:
    """The session's one engine inside this process; steps of 64 tokens, so longer rows come in chunks."""
    import numba  # noqa: F401 -- vLLM stumbles over it without our help

    before = multiprocessing.active_children()
    options = VllmOptions(model=str(tiny_llama), dtype="float32", max_batch_tokens=64)
    teacher = asyncio.run(VllmTeacher.open(options))
    assert multiprocessing.active_children() == before
    yield teacher
    asyncio.run(teacher.close())


@pytest.fixture(scope="session")
def ray_mark() -> Iterator[str]:
    """The session's one Ray, on two CPUs; `RAY_OF_THE_TESTS` is this mark in every process that it starts."""
    import ray

    mark = uuid.uuid4().hex
    os.environ["RAY_OF_THE_TESTS"] = mark
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # On a busy machine Ray Train's own minute is not enough for workers to start, and others would be started.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = "600"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield mark
    ray.shutdown()
    del os.environ["RAY_OF_THE_TESTS"]


@pytest.fixture(scope="session")
def tiny_forward(tiny_llama: Path) -> Forward:
    """Row [T] -> float32 logprobs [T, V] of a plain transformers forward."""
    return plain_forward(tiny_llama)


def plain_forward(folder: Path) -> Forward:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def forward(row: Tokens) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0]
        answer: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return answer

    return forward
