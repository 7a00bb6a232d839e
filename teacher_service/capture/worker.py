"""The capture path `sampler`: inside the engine's worker, where the full distributions are.

vLLM mixes `CaptureExtension` into its worker (`worker_extension_cls`) and the engine's owner calls `potstill_capture`
once after the start. It puts its own prompt logprobs step before the one of the running V1 model runner, for requests
that carry a `Wish`; all others are left to vLLM's. Verified with vLLM 0.32.0, whose V2 runner has no such step.

All rows of an engine step go through the head together, `head_rows` at a time, whatever requests they belong to; their
targets are computed while these logits exist. So beside the model, a step needs no more than

    logits           HEAD_BYTES, CPU_HEAD_BYTES on a CPU, and as much again where the head makes a copy of them
    working memory   2 BLOCK_BYTES for each thread on a CPU, MEMORY_COPIES * HEAD_BYTES elsewhere
    answers          4 bytes * (2 K + 2 + temperatures + 1 for the entropy + V for `dense` + 2 N) a position of each row
                     in flight, on the host

where HEAD_BYTES and BLOCK_BYTES stand for one row's 4 V or 16 N bytes if those are more (`capture_math`).

On a CPU each thread works on blocks of its own: torch's own threads meet after every operation, which takes ten
milliseconds instead of 20 us when another process has one of the cores. For the same reason they must not spin when the
head is done: `vllm_engine` sets GOMP_SPINCOUNT, without which the targets take twice the time.

Shape legend:  T tokens of a row without its prefix, R rows through the head at once, V vocabulary size, K, N draws.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.cache.encoding.draws import uniforms
from potstill.cache.errors import PotstillError
from potstill.cache.types import Fields
from potstill.teacher_service.capture.layout import Drawn, Wish, float_sections, num_floats, split
from potstill.teacher_service.capture.maths import BLOCK_BYTES, capture_block, rows_at_once

HEAD_BYTES = 128 * 2**20
"""float32 logits that the head gives at once on a GPU."""
CPU_HEAD_BYTES = 16 * 2**20
"""The same on a CPU: below the 32 MiB from which glibc maps fresh pages for each allocation, which cost a quarter of
the head's time, and small enough for the third cache."""

_STEP = "_get_prompt_logprobs_dict"
_NEEDED = (_STEP, "num_prompt_logprobs", "requests", "input_batch", "query_start_loc", "model", "model_config")
# What torch and numpy raise when they are out of memory or are handed what they do not take.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError, PotstillError)


class CaptureExtension:
    """Mixed into vLLM's worker; a worker has `model_runner`."""

    model_runner: Any

    def potstill_capture(self) -> str:
        """Capture from now on; why not, or an empty string. May be repeated."""
        runner = self.model_runner
        missing = [name for name in _NEEDED if not hasattr(runner, name)]
        if missing:
            return f"the worker's {type(runner).__name__} has no {missing[0]}"
        try:
            from vllm.v1.outputs import LogprobsTensors  # noqa: PLC0415 -- the engine starts without it, too
        except ImportError as error:
            return str(error)
        why_not = _compile() if runner.device.type == "cpu" else ""
        if why_not:
            return why_not
        if not isinstance(getattr(runner, _STEP), PromptCapture):
            setattr(runner, _STEP, PromptCapture(runner, LogprobsTensors))
        return ""


@dataclass(slots=True, eq=False)
class _Answer:
    """What one request gets, filled position by position."""

    tokens: NDArray[np.int32]
    """[T] the row."""
    ids: torch.Tensor
    floats: torch.Tensor
    views: Mapping[str, torch.Tensor]
    drawn: dict[int, Drawn] = field(default_factory=dict)
    """By the first position of each block."""
    failure: str = ""

    @classmethod
    def empty(cls, prompt: list[int], wish: Wish, vocab_size: int) -> _Answer:
        tokens = np.asarray(prompt[wish.num_prefix :], dtype=np.int32)
        sections = float_sections(wish.fields, len(tokens), vocab_size)
        ids = torch.empty((len(tokens), wish.fields.k), dtype=torch.int32)
        floats = torch.empty(num_floats(sections), dtype=torch.float32)
        return cls(tokens, ids, floats, {"ids": ids, **split(floats, sections)})

    def forget_from(self, position: int) -> None:
        """Drop what blocks gave at or after a position; the tensors are overwritten there."""
        for first, (lengths, ids, counts) in list(self.drawn.items()):
            if first >= position:
                del self.drawn[first]
            elif first + len(lengths) > position:
                kept = lengths[: position - first]
                num_ids = int(kept.sum())
                self.drawn[first] = Drawn(kept, ids[:num_ids], counts[:num_ids])
        if position == 0:
            self.failure = ""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, floats and ints, as `capture_layout` says."""
        if self.failure:
            message = np.frombuffer(self.failure.encode(), np.uint8).copy()
            return torch.empty(0, dtype=torch.int32), torch.empty(0), torch.from_numpy(message)
        ints = [self.tokens]
        if self.drawn:
            blocks = [self.drawn[first] for first in sorted(self.drawn)]
            ints += [np.concatenate(column).astype(np.int32, copy=False) for column in zip(*blocks, strict=True)]
        return self.ids, self.floats, torch.from_numpy(np.concatenate(ints))


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """Consecutive positions of one request, and where their hidden states are in this step."""

    wish: Wish
    answer: _Answer
    hidden: int
    position: int
    count: int

    def within(self, start: int, stop: int) -> _Span | None:
        """The part whose hidden states lie in a range."""
        first, last = max(start, self.hidden), min(stop, self.hidden + self.count)
        if first >= last:
            return None
        return _Span(self.wish, self.answer, first, self.position + first - self.hidden, last - first)

    def blocks(self, vocab_size: int, block_bytes: int, num_threads: int) -> Iterator[_Span]:
        """Parts that are worked on at once; of nearly equal size and as many for each thread."""
        num_blocks = -(-self.count // rows_at_once(vocab_size, self.wish.fields.draws, block_bytes))
        num_blocks = min(self.count, -(-num_blocks // num_threads) * num_threads)
        bounds = [self.hidden + self.count * i // num_blocks for i in range(num_blocks + 1)]
        for start, stop in pairwise(bounds):
            part = self.within(start, stop)
            assert part is not None, "a part of itself"
            yield part


class PromptCapture:
    """Stands before the runner's own prompt logprobs step; called once after each forward pass."""

    def __init__(self, runner: Any, transport: Callable[..., Any]) -> None:
        self._runner = runner
        self._transport = transport
        self._others = getattr(runner, _STEP)
        self._vocab_size = int(runner.model_config.get_vocab_size())
        self._num_threads = torch.get_num_threads()
        self._pool = None
        if runner.device.type == "cpu":
            self._pool = _a_core_each(self._num_threads)
            _keep_freed_memory()

    def __call__(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """Request id -> tensors of the requests whose prompt is complete."""
        wishes = self._wishes(self._runner.num_prompt_logprobs)
        held = {request_id: self._runner.num_prompt_logprobs.pop(request_id) for request_id in wishes}
        answers: dict[str, Any] = self._others(hidden_states, num_scheduled_tokens)
        # A request that was preempted is not in this step.
        spans = {
            request_id: self._span(request_id, wish, num_scheduled_tokens[request_id])
            for request_id, wish in wishes.items()
            if request_id in num_scheduled_tokens
        }
        try:
            self._capture(hidden_states, [span for span in spans.values() if span.count > 0])
        except _FAILURES as error:  # of the head; it must not end the engine
            for span in spans.values():
                span.answer.failure = _one_line(error)
        for request_id, span in spans.items():
            if span.position + span.count >= len(span.answer.tokens):
                del held[request_id]
                self._runner.requests[request_id].in_progress_prompt_logprobs_cpu = None
                answers[request_id] = self._transport(*span.answer.tensors())
        self._runner.num_prompt_logprobs.update(held)
        return answers

    def _wishes(self, request_ids: Mapping[str, Any]) -> dict[str, Wish]:
        found = {}
        for request_id in request_ids:
            request = self._runner.requests[request_id]
            wish = Wish.from_extra_args(request.sampling_params.extra_args)
            if wish is not None and request.prompt_token_ids is not None:
                found[request_id] = wish
        return found

    def _span(self, request_id: str, wish: Wish, num_tokens: int) -> _Span:
        """The wanted rows of this step; the row after the last prompt token is one of them."""
        request = self._runner.requests[request_id]
        answer = request.in_progress_prompt_logprobs_cpu
        if answer is None:
            answer = _Answer.empty(request.prompt_token_ids, wish, self._vocab_size)
            request.in_progress_prompt_logprobs_cpu = answer
        computed = request.num_computed_tokens
        skipped = max(0, wish.num_prefix - computed)
        offset = int(self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[request_id]])
        stop = min(computed + num_tokens, len(request.prompt_token_ids))
        position = computed + skipped - wish.num_prefix
        # A row that was preempted is prefilled once more, in other chunks.
        answer.forget_from(position)
        return _Span(wish, answer, offset + skipped, position, stop - computed - skipped)

    def _capture(self, hidden_states: torch.Tensor, spans: list[_Span]) -> None:
        if not spans:
            return
        head_bytes = HEAD_BYTES if self._pool is None else CPU_HEAD_BYTES
        head_rows = max(1, head_bytes // (4 * self._vocab_size))
        first = min(span.hidden for span in spans)
        last = max(span.hidden + span.count for span in spans)
        for start in range(first, last, head_rows):
            stop = min(start + head_rows, last)
            parts = [part for span in spans if (part := span.within(start, stop)) is not None]
            if not parts:
                continue
            logits = self._runner.model.compute_logits(hidden_states[start:stop])
            if logits is None:  # only the first of several tensor-parallel workers may have them
                continue
            self._targets(logits, start, parts)

    def _targets(self, logits: torch.Tensor, start: int, parts: list[_Span]) -> None:
        if self._pool is not None:
            logits = logits.float()  # by all of torch's threads, once
        block_bytes, num_threads = (HEAD_BYTES, 1) if self._pool is None else (BLOCK_BYTES, self._num_threads)
        blocks = [block for part in parts for block in part.blocks(self._vocab_size, block_bytes, num_threads)]
        tasks = [(block, logits[block.hidden - start : block.hidden - start + block.count]) for block in blocks]
        if self._pool is None or len(tasks) == 1:
            for block, rows in tasks:
                _fill(block, rows)
        else:
            for _ in self._pool.map(lambda task: _fill(*task), tasks):
                pass


def _fill(span: _Span, logits: torch.Tensor) -> None:
    """Compute the targets of a span; a failure is the request's, not the engine's."""
    try:
        _compute(span, logits)
    except _FAILURES as error:
        span.answer.failure = _one_line(error)


def _compute(span: _Span, logits: torch.Tensor) -> None:
    want, answer = span.wish.fields, span.answer
    here = slice(span.position, span.position + span.count)
    labels = None
    if want.k:
        # The last position has no label; its column is overwritten by the receiver.
        own = np.append(answer.tokens[here.start + 1 : here.stop + 1], 0)[: span.count]
        labels = torch.from_numpy(own.astype(np.int64)).to(logits.device)
    chances = None
    if want.draws:
        row_key = answer.tokens.astype(np.uint32).tobytes()
        chances = uniforms(span.count, want.draws, want.seed, row_key, start=span.position)
    views = {name: view[here] for name, view in answer.views.items()}
    drawn = capture_block(logits, labels, want, chances, views)
    if drawn is not None:
        answer.drawn[span.position] = drawn


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _cores_of(thread: str) -> set[int]:
    """The cores that a thread of this process may run on; none when it has ended meanwhile."""
    try:
        return os.sched_getaffinity(int(thread))
    except ProcessLookupError:
        return set()


def _keep_freed_memory() -> None:
    """Let glibc keep 60 MiB of freed memory, where it would give logits back to the system and fault them in again.

    It keeps twice the largest block below 32 MiB that was ever mapped alone and freed (M_TRIM_THRESHOLD in mallopt(3)).
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)


def _compile() -> str:
    """Compile, or load from disk, what the first rows would wait for; why that cannot be, or an empty string."""
    want = Fields(k=1, draws=1, entropy=True, temperatures=(2.0,), dense=True)
    sections = float_sections(want, 1, 2)
    out = split(torch.empty(num_floats(sections)), sections)
    out["ids"] = torch.empty((1, 1), dtype=torch.int32)
    try:
        capture_block(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), want, np.zeros((1, 1)), out)
    except (*_FAILURES, ImportError, OSError, EOFError, pickle.UnpicklingError) as error:
        return f"numba cannot compile or keep the capture's code ({_one_line(error)}); NUMBA_CACHE_DIR names its folder"
    return ""


def _a_core_each(num_threads: int) -> ThreadPoolExecutor:
    # vLLM may have bound this thread to one core, which new threads would inherit.
    cores = set().union(*map(_cores_of, os.listdir("/proc/self/task")))
    # Threads that wake each other are drawn to one core, where they would take turns.
    own = [{core} for core in cores] if len(cores) == num_threads else [cores] * num_threads

    def settle() -> None:
        with suppress(OSError):  # a core that was taken from the process meanwhile
            os.sched_setaffinity(0, own.pop())

    return ThreadPoolExecutor(num_threads, thread_name_prefix="capture", initializer=settle)
