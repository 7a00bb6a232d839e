"""The worker's capture step on a runner of plain tensors: rows that are prefilled in chunks and preempted between."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from potstill.cache.types import Draws, Fields, Targets
from potstill.teacher_service.capture.cpu.device import _a_core_each, _cores_of, cpu_device
from potstill.teacher_service.capture.layout import Asked, Captured
from potstill.teacher_service.capture.targets import targets_from_captured
from potstill.teacher_service.capture.worker import PromptCapture

VOCAB = 5000
LENGTH = 700
"""Tokens of the prompt: several blocks of `BLOCK_BYTES`."""
EVERYTHING = Fields(k=4, draws=3, seed=1, entropy=True, temperatures=(0.5, 3.0))

Chunk = tuple[int, int]
"""First token of the prompt, and how many."""


@dataclass(slots=True)
class SamplingParams:
    extra_args: dict[str, Any]


@dataclass(slots=True)
class Request:
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    num_computed_tokens: int = 0
    in_progress_prompt_logprobs_cpu: Any = None


@dataclass(slots=True)
class Batch:
    req_id_to_index: dict[str, int]


@dataclass(slots=True)
class Starts:
    np: Any


@dataclass(slots=True)
class Head:
    """Also the model's config."""

    weight: torch.Tensor
    breaks: bool = False

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            raise RuntimeError("out of memory")
        return hidden_states @ self.weight

    def get_vocab_size(self) -> int:
        return self.weight.shape[1]


class Widened(Head):
    """What it gives, in float32."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return Head.compute_logits(self, hidden_states).float()


@dataclass(slots=True)
class Runner:
    """What `PromptCapture` reads of vLLM's model runner, with one request `r`."""

    requests: dict[str, Request]
    model: Head
    model_config: Head
    num_prompt_logprobs: dict[str, int] = field(default_factory=lambda: {"r": 1})
    input_batch: Batch = field(default_factory=lambda: Batch({"r": 0}))
    query_start_loc: Starts = field(default_factory=lambda: Starts(np.array([0])))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _get_prompt_logprobs_dict(self, _hidden: torch.Tensor, _scheduled: dict[str, int]) -> dict[str, Any]:
        return {}


@dataclass(slots=True)
class Prefill:
    """One row on its way through the engine's steps."""

    want: Fields
    num_prefix: int = 0
    tokens: list[int] = field(init=False)
    hidden: torch.Tensor = field(init=False)
    runner: Runner = field(init=False)
    capture: PromptCapture = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)  # torch's own numbers depend on what its CPU can do
        self.tokens = rng.integers(0, VOCAB, LENGTH).tolist()
        self.hidden = torch.from_numpy(rng.standard_normal((LENGTH, 8), np.float32))
        head = Head(torch.from_numpy(rng.standard_normal((8, VOCAB), np.float32)))
        request = Request(self.tokens, SamplingParams(self.asked.to_extra_args()))
        self.runner = Runner({"r": request}, head, head)
        self.capture = PromptCapture(self.runner, lambda *tensors: tensors, cpu_device())

    def step(self, chunk: Chunk) -> dict[str, Any]:
        first, count = chunk
        self.runner.requests["r"].num_computed_tokens = first
        return self.capture(self.hidden[first : first + count], {"r": count})

    def targets(self, chunks: Sequence[Chunk]) -> Targets:
        """Of the row; only the last chunk may complete it."""
        for chunk in chunks[:-1]:
            assert self.step(chunk) == {}
        captured = Captured(*(tensor.numpy() for tensor in self.step(chunks[-1])["r"]))
        return targets_from_captured(captured, self.asked, VOCAB)

    @property
    def asked(self) -> Asked:
        return Asked(tokens=self.tokens, num_prefix=self.num_prefix, want=self.want)


def assert_same(ours: Targets, theirs: Targets) -> None:
    assert isinstance(ours.draws, Draws)
    assert isinstance(theirs.draws, Draws)
    for name in ("offsets", "ids", "counts"):
        np.testing.assert_array_equal(getattr(ours.draws, name), getattr(theirs.draws, name))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    # The head's product may round otherwise with another number of rows.
    for name in ("logprobs", "log_tail", "label_logprob", "entropy", "log_z"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 300), (300, 400)],
        [(0, 512), (0, 333), (333, 367)],
        [(0, 333), (333, 300), (0, 512), (512, 188)],
        [(0, 512), (0, 3), (3, 100), (103, 597)],
        [(0, 512), (407, 200), (607, 93)],
        [(0, 512), (512, 100), (0, 512), (0, 700)],
    ],
    ids=["chunked", "shorter chunks", "longer chunks", "within the prefix", "inside a block", "twice"],
)
def test_a_preempted_row_gets_the_targets_of_one_that_was_not(chunks: list[Chunk], num_prefix: int) -> None:
    whole = Prefill(EVERYTHING, num_prefix).targets([(0, LENGTH)])
    assert whole.num_positions == LENGTH - num_prefix
    assert_same(Prefill(EVERYTHING, num_prefix).targets(chunks), whole)


def test_a_failure_before_the_preemption_is_forgotten() -> None:
    whole = Prefill(EVERYTHING).targets([(0, LENGTH)])
    row = Prefill(EVERYTHING)
    row.runner.model.breaks = True
    assert row.step((0, 512)) == {}
    row.runner.model.breaks = False
    assert_same(row.targets([(0, 333), (333, 367)]), whole)


def test_each_of_the_captures_threads_has_a_core_of_its_own_where_there_are_as_many() -> None:
    mine = os.sched_getaffinity(0)
    num_threads = len(mine)
    with _a_core_each(num_threads) as pool:
        together = threading.Barrier(num_threads)

        def cores(_: int) -> set[int]:
            together.wait(timeout=300)  # so that each thread takes one
            return os.sched_getaffinity(0)

        taken = list(pool.map(cores, range(num_threads)))
    assert sorted(core for each in taken for core in each) == sorted(mine)
    assert os.sched_getaffinity(0) == mine


def test_logits_of_a_narrower_type_are_those_of_float32() -> None:
    whole, narrow = Prefill(EVERYTHING), Prefill(EVERYTHING)
    for row in (whole, narrow):
        row.hidden, row.runner.model.weight = row.hidden.bfloat16(), row.runner.model.weight.bfloat16()
    whole.runner.model = Widened(whole.runner.model.weight)
    assert_same(narrow.targets([(0, LENGTH)]), whole.targets([(0, LENGTH)]))


def test_a_thread_that_has_ended_names_no_cores() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    deadline = time.monotonic() + 300
    while _cores_of(str(thread.native_id)):
        assert time.monotonic() < deadline
    assert _cores_of(str(threading.get_native_id())) == os.sched_getaffinity(0)
