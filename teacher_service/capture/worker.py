"""The capture path `sampler`: inside the engine's worker, where the full distributions are.

vLLM mixes `CaptureExtension` into its worker (`worker_extension_cls`) and the engine's owner calls `potstill_capture`
once after the start. It puts its own prompt logprobs step before the one of the running V1 model runner, for requests
that carry fields of ours (`Asked`); all others are left to vLLM's. Verified with vLLM 0.32.0, whose V2 runner has no
such step.

All rows of an engine step go through the head together, `head_rows` at a time, whatever requests they belong to; their
targets are computed while these logits exist. So beside the model, a step needs no more than

    logits           `head_bytes` of the device, and as much again where the head makes a copy of them
    working memory   what the device says (`torch_device`, `cpu_device`)
    answers          4 bytes * (2 K + 2 + temperatures + 1 for the entropy + V for `dense` + 2 N) a position of each row
                     in flight, on the host

Shape legend:  T tokens of a row without its prefix, R rows through the head at once, V vocabulary size, K, N draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.cache.encoding.draws import uniforms
from potstill.cache.types import Fields
from potstill.teacher_service.capture.device import FAILURES, CaptureDevice, one_line, torch_device
from potstill.teacher_service.capture.layout import Asked, Drawn, float_sections, num_floats, split

_STEP = "_get_prompt_logprobs_dict"
# Internals of vLLM's runner: where another version lacks one, the next capture path is taken.
_NEEDED = (_STEP, "num_prompt_logprobs", "requests", "input_batch", "query_start_loc", "model", "model_config")


class CaptureExtension:
    """Methods that vLLM mixes into its worker, which has a `model_runner`."""

    model_runner: Any

    def potstill_capture(self) -> str:
        """Capture from now on; returns the reason where that is impossible, else an empty string. May be repeated."""
        runner = self.model_runner
        missing = [name for name in _NEEDED if not hasattr(runner, name)]
        if missing:
            return f"the worker's {type(runner).__name__} has no {missing[0]}"
        if isinstance(getattr(runner, _STEP), PromptCapture):
            return ""
        try:
            from vllm.v1.outputs import LogprobsTensors  # noqa: PLC0415 -- the engine starts without it, too

            device = _device(runner.device.type)
        except (ImportError, RuntimeError) as error:
            return str(error)
        setattr(runner, _STEP, PromptCapture(runner, LogprobsTensors, device))
        return ""


def _device(kind: str) -> CaptureDevice:
    if kind != "cpu":
        return torch_device()
    from potstill.teacher_service.capture.cpu.device import cpu_device  # noqa: PLC0415

    return cpu_device()


@dataclass(slots=True, eq=False)
class _Answer:
    """The answer to one request, filled position by position."""

    want: Fields
    tokens: NDArray[np.int32]
    """[T] the row."""
    ids: torch.Tensor
    floats: torch.Tensor
    views: Mapping[str, torch.Tensor]
    drawn: dict[int, Drawn] = field(default_factory=dict)
    """Draws of each block, by its first position."""
    failure: str = ""

    @classmethod
    def empty(cls, asked: Asked, vocab_size: int) -> _Answer:
        tokens = np.asarray(asked.tokens[asked.num_prefix :], dtype=np.int32)
        sections = float_sections(asked.want, len(tokens), vocab_size)
        ids = torch.empty((len(tokens), asked.want.k), dtype=torch.int32)
        floats = torch.empty(num_floats(sections), dtype=torch.float32)
        return cls(asked.want, tokens, ids, floats, {"ids": ids, **split(floats, sections)})

    def forget_from(self, position: int) -> None:
        """Drop draws at and after a position, which are to be computed again; the tensors are overwritten there."""
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
        """Ids, floats and ints, laid out as `layout` says."""
        if self.failure:
            message = np.frombuffer(self.failure.encode(), np.uint8).copy()
            return torch.empty(0, dtype=torch.int32), torch.empty(0), torch.from_numpy(message)
        ints = [self.tokens]
        if self.drawn:
            blocks = [self.drawn[first] for first in sorted(self.drawn)]
            ints += [np.concatenate(column).astype(np.int32, copy=False) for column in zip(*blocks, strict=True)]
        return self.ids, self.floats, torch.from_numpy(np.concatenate(ints))


@dataclass(frozen=True, slots=True, eq=False)
class PositionRange:
    """Consecutive positions of one request that are in this step."""

    answer: _Answer
    hidden: int
    """Row of the first position's hidden state, among those of the step."""
    position: int
    """First position, counted in the row without its prefix."""
    count: int

    def within(self, start: int, stop: int) -> PositionRange | None:
        """The part whose hidden states are rows `start` to `stop` of the step; None where there is none."""
        first, last = max(start, self.hidden), min(stop, self.hidden + self.count)
        if first >= last:
            return None
        return PositionRange(self.answer, first, self.position + first - self.hidden, last - first)

    def blocks(self, vocab_size: int, device: CaptureDevice) -> Iterator[PositionRange]:
        """Cut into blocks of nearly equal size, the same number for each thread of the device."""
        # Many draws take as much memory to look up as logits do.
        rows_at_once = max(1, device.block_bytes // (4 * max(vocab_size, 4 * self.answer.want.draws)))
        num_blocks = -(-self.count // rows_at_once)
        num_blocks = min(self.count, -(-num_blocks // device.num_threads) * device.num_threads)
        bounds = [self.hidden + self.count * i // num_blocks for i in range(num_blocks + 1)]
        for start, stop in pairwise(bounds):
            part = self.within(start, stop)
            assert part is not None, "a part of itself"
            yield part


class PromptCapture:
    """Replaces the runner's own prompt logprobs step, which it calls for other requests. Runs once a forward pass."""

    def __init__(self, runner: Any, transport: Callable[..., Any], device: CaptureDevice) -> None:
        self._runner = runner
        self._transport = transport
        self._others = getattr(runner, _STEP)
        self._vocab_size = int(runner.model_config.get_vocab_size())
        self._device = device

    def __call__(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """Capture this step; returns the tensors of requests whose prompt is complete, by request id."""
        ours = self._ours(self._runner.num_prompt_logprobs)
        # vLLM's own step works on all that this table names: ours are taken out for it, and put back while incomplete.
        held = {request_id: self._runner.num_prompt_logprobs.pop(request_id) for request_id in ours}
        answers: dict[str, Any] = self._others(hidden_states, num_scheduled_tokens)
        # A request that was preempted is not in this step.
        ranges = {
            request_id: self._range(request_id, asked, num_scheduled_tokens[request_id])
            for request_id, asked in ours.items()
            if request_id in num_scheduled_tokens
        }
        try:
            self._capture(hidden_states, [each for each in ranges.values() if each.count > 0])
        except FAILURES as error:  # of the head; it must not end the engine
            for each in ranges.values():
                each.answer.failure = one_line(error)
        for request_id, each in ranges.items():
            if each.position + each.count >= len(each.answer.tokens):
                del held[request_id]
                self._runner.requests[request_id].in_progress_prompt_logprobs_cpu = None
                answers[request_id] = self._transport(*each.answer.tensors())
        self._runner.num_prompt_logprobs.update(held)
        return answers

    def _ours(self, request_ids: Iterable[str]) -> dict[str, Asked]:
        requests = {request_id: self._runner.requests[request_id] for request_id in request_ids}
        read = {
            key: Asked.from_request(r.prompt_token_ids, r.sampling_params.extra_args) for key, r in requests.items()
        }
        return {request_id: asked for request_id, asked in read.items() if asked is not None}

    def _range(self, request_id: str, asked: Asked, num_tokens: int) -> PositionRange:
        """The positions of one request in this step, up to that of the last prompt token."""
        request = self._runner.requests[request_id]
        # The answer is kept where vLLM would keep its own, so that it goes when vLLM drops the request.
        answer = request.in_progress_prompt_logprobs_cpu
        if answer is None:
            answer = _Answer.empty(asked, self._vocab_size)
            request.in_progress_prompt_logprobs_cpu = answer
        computed = request.num_computed_tokens
        skipped = max(0, asked.num_prefix - computed)
        offset = int(self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[request_id]])
        stop = min(computed + num_tokens, len(asked.tokens))
        position = computed + skipped - asked.num_prefix
        # A preempted request is prefilled once more, perhaps in other chunks.
        answer.forget_from(position)
        return PositionRange(answer, offset + skipped, position, stop - computed - skipped)

    def _capture(self, hidden_states: torch.Tensor, ranges: list[PositionRange]) -> None:
        if not ranges:
            return
        head_rows = max(1, self._device.head_bytes // (4 * self._vocab_size))
        first = min(each.hidden for each in ranges)
        last = max(each.hidden + each.count for each in ranges)
        for start in range(first, last, head_rows):
            stop = min(start + head_rows, last)
            inside = [part for each in ranges if (part := each.within(start, stop)) is not None]
            if not inside:
                continue
            logits = self._runner.model.compute_logits(hidden_states[start:stop])
            if logits is None:  # only the first of several tensor-parallel workers may have them
                continue
            self._targets(logits, start, inside)

    def _targets(self, logits: torch.Tensor, start: int, ranges: list[PositionRange]) -> None:
        """Compute the targets of some ranges; a failure fails the request and not the engine."""
        logits = logits.float()  # at once: on a CPU by all of torch's threads

        def compute(block: PositionRange) -> None:
            first = block.hidden - start
            try:
                _compute(block, logits[first : first + block.count], self._device)
            except FAILURES as error:
                block.answer.failure = one_line(error)

        blocks = [block for each in ranges for block in each.blocks(self._vocab_size, self._device)]
        for _ in self._device.map(compute, blocks):
            pass


def _compute(block: PositionRange, logits: torch.Tensor, device: CaptureDevice) -> None:
    answer, want = block.answer, block.answer.want
    here = slice(block.position, block.position + block.count)
    labels = None
    if want.k:
        # The last position has no label; its column is overwritten by the receiver.
        own = np.append(answer.tokens[here.start + 1 : here.stop + 1], 0)[: block.count]
        labels = torch.from_numpy(own.astype(np.int64)).to(logits.device)
    chances = None
    if want.draws:
        row_key = answer.tokens.astype(np.uint32).tobytes()
        chances = uniforms(block.count, want.draws, want.seed, row_key, start=block.position)
    views = {name: view[here] for name, view in answer.views.items()}
    drawn = device.capture_block(logits, labels, want, chances, views)
    if drawn is not None:
        answer.drawn[block.position] = drawn
