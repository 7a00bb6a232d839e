"""The capture paths from vLLM's engine to `Targets`, best first. Imported once vLLM is.

    sampler      the worker computes every field from the full distributions (`capture.worker`); private
    arrays       the top-k as the tensors that vLLM's worker sends, before it makes an object of each entry; private
    public-flat  the top-k as vLLM's `FlatLogprobs`; public, and what the other two are checked against

A private path changes the state of our own requests only: the object that receives one request's logprobs is exchanged
after the request was added, and the worker looks only at requests that carry our fields. vLLM answers any other request
of the same engine as usual. Verified with vLLM 0.32.0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from functools import cache
from typing import Any, Literal, TypeAlias

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Targets
from potstill.teacher_service.capture.layout import Asked, Captured
from potstill.teacher_service.capture.targets import FlatEntries, targets_from_captured, targets_from_flat

PathName: TypeAlias = Literal["sampler", "arrays", "public-flat"]
WORKER_EXTENSION = "potstill.teacher_service.capture.worker.CaptureExtension"


class CapturePath(ABC):
    """A way in which one engine's answers become targets."""

    name: PathName
    """The name, as provenance has it."""
    gives_every_field = False
    """True where more than the top-k can be asked for."""
    private = False
    """True where the path rests on internals of vLLM, and so is checked before it is used."""

    def install(self, engine: Any) -> str:  # noqa: ARG002 -- for those that need it
        """Prepare vLLM's engine; returns the reason where that is impossible, else an empty string."""
        return ""

    @abstractmethod
    def sampling_params(self, asked: Asked) -> Any:
        """The `SamplingParams` that ask vLLM for one row."""

    def added(self, engine: Any, request_id: str) -> None:  # noqa: B027 -- for those that need it
        """Prepare one request after vLLM has accepted it under its own `request_id`."""

    @abstractmethod
    def targets(self, output: Any, asked: Asked, vocab_size: int) -> Targets:
        """Make the targets of one finished `RequestOutput`.

        Raises:
            TeacherFailed: the answer does not fit the request.
        """


class PublicFlatPath(CapturePath):
    """The public path: `FlatLogprobs`, which are two Python lists per row with an object for each entry."""

    name: PathName = "public-flat"

    def sampling_params(self, asked: Asked) -> Any:
        """Top-k of the prompt and of the one sampled token."""
        k = asked.want.k
        return _sampling_params(prompt_logprobs=k, logprobs=k, flat_logprobs=True)

    def targets(self, output: Any, asked: Asked, vocab_size: int) -> Targets:
        """See `CapturePath`."""
        return targets_from_flat(_flat(output.prompt_logprobs), _sampled(output), asked, vocab_size)


class ArraysPath(PublicFlatPath):
    """The top-k as the worker's tensors, and one position of `FlatLogprobs` for the last target."""

    name: PathName = "arrays"
    private = True

    def added(self, engine: Any, request_id: str) -> None:
        """Exchange the request's logprobs processor for one that keeps tensors and makes no objects of entries."""
        # The output processor is in this process even where the engine's core is in another one.
        state = engine.output_processor.request_states[request_id]
        processor = state.logprobs_processor
        kind = _keeping(processor.__class__)
        state.logprobs_processor = kind(**{field.name: getattr(processor, field.name) for field in fields(processor)})

    def targets(self, output: Any, asked: Asked, vocab_size: int) -> Targets:
        """See `CapturePath`."""
        # A prompt of one token has no prompt logprobs, and so no tensors.
        prompt = FlatEntries(ids=[], logprobs=[])
        if len(asked.tokens) > 1:
            kept = _kept(output)
            prompt = FlatEntries(ids=kept.ids, logprobs=kept.floats)
        return targets_from_flat(prompt, _sampled(output), asked, vocab_size)


class SamplerPath(ArraysPath):
    """Every field of all T targets of a row, computed by the worker; its tensors are kept as by `ArraysPath`."""

    name = "sampler"
    gives_every_field = True

    def install(self, engine: Any) -> str:
        """Ask every worker to capture; returns the first reason against it that one of them gives."""
        reasons: list[str] = engine.collective_rpc("potstill_capture")
        return next(filter(None, reasons), "")

    def sampling_params(self, asked: Asked) -> Any:
        """Ask vLLM for no entries of its own, but so that it calls the worker's prompt logprobs step."""
        return _sampling_params(prompt_logprobs=0, extra_args=asked.to_extra_args())

    def targets(self, output: Any, asked: Asked, vocab_size: int) -> Targets:
        """See `CapturePath`."""
        return targets_from_captured(_kept(output), asked, vocab_size)


def paths_from(best: str) -> list[CapturePath]:
    """The paths to try in turn: `best` and those behind it; all of them for `auto`."""
    paths: list[CapturePath] = [SamplerPath(), ArraysPath(), PublicFlatPath()]
    names = [path.name for path in paths]
    return paths[0 if best == "auto" else names.index(best) :]  # type: ignore[arg-type]


@cache
def _keeping(kind: type) -> type:
    return type("KeepsTensors", (kind,), {"_update_prompt_logprobs": _keep})


def _keep(processor: Any, tensors: Any) -> None:
    # The worker sends them once, when the prompt is complete, so that there is nothing to append to.
    ids, floats, ints, *_ = tensors
    processor.prompt_logprobs = Captured(ids.numpy(), floats.numpy(), ints.numpy())


def _kept(output: Any) -> Captured:
    if not isinstance(output.prompt_logprobs, Captured):
        raise TeacherFailed("the engine's answer has no arrays")
    return output.prompt_logprobs


def _sampled(output: Any) -> FlatEntries:
    return _flat(output.outputs[0].logprobs if output.outputs else None)


def _flat(logprobs: Any) -> FlatEntries:
    if not logprobs:
        return FlatEntries(ids=[], logprobs=[])
    return FlatEntries(ids=logprobs.token_ids, logprobs=logprobs.logprobs)


def _sampling_params(**more: Any) -> Any:
    """Parameters common to all paths, and `more`."""
    # One token is sampled because vLLM takes no fewer; only the finished answer is wanted.
    return SamplingParams(
        max_tokens=1, temperature=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **more
    )
