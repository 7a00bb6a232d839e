"""vLLM's `LLMEngine` behind the few calls that scoring needs; the only importer of vllm.

vLLM keeps its process groups, its forward context and its clean-up in module state, so one process
holds one engine: two built side by side do score, but closing either breaks the other ("pipeline
model parallel group is not initialized"). The first open engine of a process therefore runs inside
it, and every further one in a process of its own, which costs about ten seconds more to start and
one more import of vLLM. Such a process is spawned, so a script that opens a second teacher needs
the usual `if __name__ == "__main__":`. So does the first one where numba was loaded before it, by the
`archive` encoding: while it starts, vLLM looks into every module's attributes and stumbles over one of llvmlite.

torch compiles one small kernel on the first request, which takes up to half a minute the first time on a
machine; a warm-up at the start takes that from the first caller. Without a C++ compiler it is not compiled.

Run with vLLM 0.32 on CPUs; not run on a GPU.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache.types import Targets
from teacher_service.capture import FlatEntries, targets_from_flat

_LOG = logging.getLogger(__name__)

# vLLM's state is the process's, so these two are as well (see the module's docstring).
_INSIDE_THIS_PROCESS = threading.Lock()
_ONE_START_AT_A_TIME = threading.Lock()

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the default only; each engine says where it runs
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy locks that other threads hold
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout belongs to commands that print JSON
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_POLL_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the running engine says about itself."""

    vocab_size: int
    dtype: str
    head_dtype: str
    max_model_len: int
    """Tokens, the one that is sampled included."""
    device: str
    version: str


class VllmEngine:
    """vLLM's `LLMEngine` behind the few calls that scoring needs. Used by one thread only."""

    def __init__(self, arguments: dict[str, Any], *, cpu_kv_cache_bytes: int) -> None:
        self._inside = "llvmlite" not in sys.modules and _INSIDE_THIS_PROCESS.acquire(blocking=False)
        try:
            with _ONE_START_AT_A_TIME:
                self._vllm = _import_vllm()
                self._engine = self._build(arguments, cpu_kv_cache_bytes=cpu_kv_cache_bytes)
        except BaseException:
            self._free_process()
            raise
        try:
            self._warm_up()
            self.facts = self._facts()
        except BaseException:
            self.close()
            raise

    def add(self, request_id: str, prompt: list[int], k: int) -> None:
        """Queue one row; `ValueError` when vLLM refuses it."""
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=k, logprobs=k, flat_logprobs=True
        )
        self._engine.add_request(request_id, self._vllm.inputs.tokens_input(prompt), params)

    def abort(self, request_ids: list[str]) -> None:
        """Take requests out; unknown and finished ones are ignored."""
        self._engine.abort_request(request_ids)

    def can_step(self) -> bool:
        """Whether `step` would work at once instead of waiting for another process.

        vLLM's own wait never ends when that process was killed, hence the look before the leap.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: that process is gone.
        """
        if self._inside:
            return True
        core = self._engine.engine_core
        if core.outputs_queue.empty():
            core.ensure_alive()
            return False
        return True

    def step(self) -> list[tuple[str, Any]]:
        """One engine step; the rows that it finished, as request id and vLLM's `RequestOutput`."""
        return [(output.request_id, output) for output in self._engine.step() if output.finished]

    def close(self) -> None:
        """Free what the engine holds; a failed engine may not manage, which is logged."""
        try:
            self._engine.renderer.shutdown()
            self._engine.engine_core.shutdown()
        except Exception:  # noqa: BLE001 -- there is nothing left to do, and nobody to tell
            _LOG.warning("vLLM did not shut down cleanly", exc_info=True)
        finally:
            del self._engine
            self._free_process()

    def _build(self, arguments: dict[str, Any], *, cpu_kv_cache_bytes: int) -> Any:
        arguments = dict(arguments)
        if self._vllm.platforms.current_platform.is_cpu():
            arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes
            if arguments["dtype"] == "auto" and not _has_bfloat16_instructions():
                arguments["dtype"] = "float32"  # bfloat16 is emulated there, and five times slower
        return self._vllm.LLMEngine.from_engine_args(
            self._vllm.EngineArgs(**arguments), enable_multiprocessing=not self._inside
        )

    def _warm_up(self) -> None:
        """One tiny request: torch compiles a kernel for it, and the first caller would wait for that."""
        self.add("warm-up", [0, 0], 1)
        while self._engine.has_unfinished_requests():
            if self.can_step():
                self.step()
            else:
                time.sleep(_POLL_SECONDS)

    def _facts(self) -> EngineFacts:
        config = self._engine.model_config
        device = str(self._engine.vllm_config.device_config.device_type)
        if device != "cpu":
            device += f":{self._vllm.platforms.current_platform.get_device_name()}"
        return EngineFacts(
            vocab_size=int(config.get_vocab_size()),
            dtype=str(config.dtype).removeprefix("torch."),
            head_dtype=str(config.head_dtype).removeprefix("torch."),
            max_model_len=int(config.max_model_len),
            device=device,
            version=str(self._vllm.__version__),
        )

    def _free_process(self) -> None:
        if self._inside:
            self._inside = False
            _INSIDE_THIS_PROCESS.release()


def _import_vllm() -> Any:
    """The module, imported with the settings it reads from the environment; takes seconds the first time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if not any(map(shutil.which, compilers)):
        # vLLM compiles one small kernel for logprobs; without a compiler it runs as it is written, somewhat slower.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch's own wrapper around a deprecated name, met by vLLM's start on every machine without Triton.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
    import vllm.inputs  # noqa: PLC0415 -- only now, see above
    import vllm.platforms  # noqa: PLC0415

    return vllm


def _has_bfloat16_instructions() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def targets_of(output: Any, *, tokens: list[int], num_prefix: int, k: int, vocab_size: int) -> Targets:
    """From one finished `RequestOutput` of vLLM."""
    empty = FlatEntries(ids=[], logprobs=[])
    prompt = output.prompt_logprobs
    sampled = output.outputs[0].logprobs if output.outputs else None
    return targets_from_flat(
        FlatEntries(ids=prompt.token_ids, logprobs=prompt.logprobs) if prompt else empty,
        FlatEntries(ids=sampled.token_ids, logprobs=sampled.logprobs) if sampled else empty,
        tokens=tokens,
        num_prefix=num_prefix,
        k=k,
        vocab_size=vocab_size,
    )


def one_line(error: BaseException) -> str:
    """What went wrong, short; of vLLM's settings classes the first complaint, without pydantic's frame."""
    text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
    text = textwrap.shorten(text.removeprefix("Value error, "), 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
