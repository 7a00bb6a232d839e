"""vLLM's `LLMEngine` behind the few calls that scoring needs; with the capture files the only importer of vllm.

vLLM keeps its process groups, its forward context and its clean-up in module state, so one process
holds one engine: two built side by side do score, but closing either breaks the other ("pipeline
model parallel group is not initialized"). The first open engine of a process therefore runs inside
it, and every further one in a process of its own, which costs about ten seconds more to start and
one more import of vLLM. Such a process is spawned, so a script that opens a second teacher needs
the usual `if __name__ == "__main__":`.

A capture path turns answers into targets (`capture.paths`). The engine takes the best path that agrees with vLLM's
public one on a few tokens (`capture.check`), and logs once why a better one was passed over.

torch compiles one small kernel on the first request, which takes up to half a minute the first time on a
machine; a warm-up at the start takes that from the first caller. Without a C++ compiler it is not compiled.

Run with vLLM 0.32 on CPUs; not run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import textwrap
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Fields, Provenance, Targets
from potstill.teacher_service.capture.check import MAX_PUBLIC_K, checked_fields, checked_row, disagreement
from potstill.teacher_service.capture.layout import Asked
from potstill.teacher_service.engine.core_process import Lifeline, failing_with_the_cause
from potstill.teacher_service.engine.lokilm import ARCHITECTURE as LOKILM
from potstill.teacher_service.engine.lokilm.check import compared_row, plain_logprobs, too_far

if TYPE_CHECKING:
    from potstill.teacher_service.capture.paths import CapturePath

_LOG = logging.getLogger(__name__)

# vLLM's state belongs to the process, so these two locks do as well (see the module's docstring).
_INSIDE_THIS_PROCESS = threading.Lock()
_ONE_START_AT_A_TIME = threading.Lock()

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the default only; each engine says where it runs
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its prompt logprobs step has no place for ours
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy locks that other threads hold
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout belongs to commands that print JSON
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # torch's threads otherwise spin for milliseconds after the head, on cores that the capture's threads need; read
    # when torch is first imported.
    "GOMP_SPINCOUNT": "1000",
    # At every start on CPUs: how memory is bound to NUMA nodes, which nobody can do anything about. Errors are told.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_POLL_SECONDS = 0.002
_KILLED_SECONDS = 10.0  # vLLM kills an engine's process after five and does not wait for its end


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Properties of the running engine."""

    vocab_size: int
    dtype: str
    head_dtype: str
    max_model_len: int
    """Longest prompt and the one sampled token, together."""
    provenance: Provenance
    gives_every_field: bool
    why_not_better: str
    """Reason for which the capture path is not the best one; empty where it is."""


class VllmEngine:
    """vLLM's `LLMEngine` behind the few calls that scoring needs. Used by one thread only.

    Args:
        arguments: keyword arguments of `vllm.EngineArgs`; `max_logprobs` is the largest top-k of any caller, and
            `kv_cache_memory_bytes` is of a CPU platform.
        capture: the best capture path to take, by name, or `auto`.
        lora: folder of the adapter that every row is scored with; empty for none.
    """

    def __init__(self, arguments: dict[str, Any], *, capture: str = "auto", lora: str = "") -> None:
        self._inside = _INSIDE_THIS_PROCESS.acquire(blocking=False)
        try:
            with _ONE_START_AT_A_TIME:
                self._vllm = _import_vllm()
                from potstill.teacher_service.capture import paths as capture_paths  # noqa: PLC0415 -- vLLM is set up only now

                self._paths = capture_paths
                self._lora = self._vllm.lora.request.LoRARequest("adapter", 1, lora) if lora else None
                self._engine = self._build(arguments)
        except BaseException:
            self._free_process()
            raise
        self._vocab_size = int(self._engine.model_config.get_vocab_size())
        try:
            self._warm_up()
            self._path, why_not_better = self._choose_path(capture, max_top_k=int(arguments["max_logprobs"]))
            self.facts = self._facts(why_not_better)
            if LOKILM in self._engine.model_config.architectures and self._lora is None:
                self._compare_with_transformers(arguments)
        except BaseException:
            self.close()
            raise

    def add(self, request_id: str, asked: Asked, *, path: CapturePath | None = None) -> None:
        """Queue one row, for the path in use unless told otherwise. Raises ValueError when vLLM refuses it."""
        path = path or self._path
        prompt = self._vllm.inputs.tokens_input(asked.tokens)
        params = path.sampling_params(asked)
        added = self._engine.add_request(request_id, prompt, params, lora_request=self._lora)
        path.added(self._engine, added)

    def targets(self, output: Any, asked: Asked) -> Targets:
        """The targets of one finished request, by the path in use.

        Raises:
            TeacherFailed: the answer does not fit the request, or holds a NaN.
        """
        return self._path.targets(output, asked, self._vocab_size)

    def abort(self, request_ids: list[str]) -> None:
        """Take requests out of the engine; unknown and finished ones are ignored."""
        self._engine.abort_request(request_ids)

    def can_step(self) -> bool:
        """True where `step` has something to do and would not wait for another process.

        An engine in another process sends a message after each of its steps, also in the middle of a long row. vLLM's
        own wait for it never ends when the process was killed, so `step` must not be called before one is there.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: the engine's process is gone.
        """
        if self._inside:
            return bool(self._engine.has_unfinished_requests())
        core = self._engine.engine_core
        if core.outputs_queue.empty():
            core.ensure_alive()
            return False
        return True

    def step(self) -> list[tuple[str, Any]]:
        """Do one engine step; returns the rows that it finished, as request id and vLLM's `RequestOutput`."""
        return [(output.request_id, output) for output in self._engine.step() if output.finished]

    def close(self) -> None:
        """Free what the engine holds; a failed engine may not manage, which is logged."""
        try:
            core = self._engine.engine_core
            processes = _processes_of(core)  # now, as the shutdown forgets them
            self._engine.renderer.shutdown()
            core.shutdown()
            for process in processes:
                process.join(_KILLED_SECONDS)
                if process.is_alive():
                    _LOG.warning("process %d of an engine lives on %g s after its end", process.pid, _KILLED_SECONDS)
        except Exception:  # noqa: BLE001 -- there is nothing left to do, and nobody to tell
            _LOG.warning("vLLM did not shut down cleanly", exc_info=True)
        finally:
            del self._engine
            self._free_process()

    def _build(self, arguments: dict[str, Any]) -> Any:
        arguments = {
            **arguments,
            "max_logprobs": max(arguments["max_logprobs"], MAX_PUBLIC_K),  # the self-check asks for more than callers
            # With statistics another process sends a message after each step; without, only those with answers.
            "disable_log_stats": self._inside,
        }
        if "worker_extension_cls" in self._vllm.EngineArgs.__dataclass_fields__:
            arguments["worker_extension_cls"] = self._paths.WORKER_EXTENSION
        if not self._vllm.platforms.current_platform.is_cpu():
            del arguments["kv_cache_memory_bytes"]  # a GPU's follows `gpu_memory_utilization`
        elif arguments["dtype"] == "auto" and not _has_bfloat16_instructions():
            arguments["dtype"] = "float32"  # bfloat16 is emulated there, and five times slower
        engine_args = self._vllm.EngineArgs(**arguments, additional_config={"potstill": Lifeline()})
        try:
            with failing_with_the_cause():
                engine = self._vllm.LLMEngine.from_engine_args(engine_args, enable_multiprocessing=not self._inside)
        except ValueError as error:
            _import_model(self._vllm, error)
            raise
        engine.logger_manager = None  # nobody reads vLLM's own metrics
        return engine

    def _warm_up(self) -> None:
        """Score one tiny request, for which torch compiles a kernel that the first caller would wait for."""
        self._score_alone(self._paths.PublicFlatPath(), Asked(tokens=[0, 0], num_prefix=0, want=Fields(k=1)))

    def _choose_path(self, best: str, *, max_top_k: int) -> tuple[CapturePath, str]:
        """The first path from `best` on that can be used, and the reasons against those before it."""
        reasons = []
        for path in self._paths.paths_from(best):
            reason = self._why_not(path, max_top_k)
            if not reason:
                break
            reasons.append(f"{path.name}: {reason}")
            _LOG.warning("targets are not captured by the path %r: %s", path.name, reason)
        return path, "; ".join(reasons)

    def _why_not(self, path: CapturePath, max_top_k: int) -> str:
        if not path.private:
            return ""
        row = checked_row(self._vocab_size, int(self._engine.model_config.max_model_len) - 1)
        want = checked_fields(self._vocab_size, max_top_k, every_field=path.gives_every_field)
        public = Asked(tokens=row, num_prefix=0, want=Fields(k=min(MAX_PUBLIC_K, self._vocab_size)))
        try:
            reason = path.install(self._engine)
            if reason:
                return reason
            ours = self._score_alone(path, Asked(tokens=row, num_prefix=0, want=want))
            theirs = self._score_alone(self._paths.PublicFlatPath(), public)
        except Exception as error:  # noqa: BLE001 -- whatever a private seam raises, there is another path
            return one_line(error)
        return disagreement(ours, theirs, want, np.asarray(row, np.uint32))

    def _compare_with_transformers(self, arguments: dict[str, Any]) -> None:
        row = compared_row(self._vocab_size, self.facts.max_model_len - 1)
        k = min(64, int(arguments["max_logprobs"]), self._vocab_size)
        ours = self._score_alone(self._path, Asked(tokens=row, num_prefix=0, want=Fields(k=k)))
        plain = plain_logprobs(arguments["model"], arguments["revision"], np.asarray(row, np.uint32))
        wrong = too_far(ours, plain, self.facts.dtype, arguments["quantization"])
        if wrong:
            raise TeacherFailed(wrong)

    def _score_alone(self, path: CapturePath, asked: Asked) -> Targets:
        self.add("alone", asked, path=path)
        while self._engine.has_unfinished_requests():
            if not self.can_step():
                time.sleep(_POLL_SECONDS)
                continue
            for _, output in self.step():
                return path.targets(output, asked, self._vocab_size)
        raise TeacherFailed("the engine did not answer its first request")

    def _facts(self, why_not_better: str) -> EngineFacts:
        config = self._engine.model_config
        device = str(self._engine.vllm_config.device_config.device_type)
        if device != "cpu":
            device += f":{self._vllm.platforms.current_platform.get_device_name()}"
        return EngineFacts(
            vocab_size=self._vocab_size,
            dtype=str(config.dtype).removeprefix("torch."),
            head_dtype=str(config.head_dtype).removeprefix("torch."),
            max_model_len=int(config.max_model_len),
            provenance=Provenance(
                engine="vllm",
                engine_version=str(self._vllm.__version__),
                device=device,
                capture_path=self._path.name,
            ),
            gives_every_field=self._path.gives_every_field,
            why_not_better=why_not_better,
        )

    def _free_process(self) -> None:
        if self._inside:
            self._inside = False
            _INSIDE_THIS_PROCESS.release()


def _processes_of(core: Any) -> list[Any]:
    """Processes behind vLLM's client of an engine; none where the engine is in this process."""
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    return list(getattr(manager, "processes", ()))


def _import_vllm() -> Any:
    """Import vLLM with the settings that it reads from the environment; takes seconds the first time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if not any(map(shutil.which, compilers)):
        # vLLM compiles one small kernel for logprobs; without a compiler it runs as it is written, somewhat slower.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # While it is imported, vLLM logs before it has set up its logger: on CPUs that Triton has no CPU backend.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    # torch's own wrapper around a deprecated name, met by vLLM's start on every machine without Triton.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
    import vllm.inputs  # noqa: PLC0415 -- only now, see above
    import vllm.lora.request  # noqa: PLC0415
    import vllm.platforms  # noqa: PLC0415

    with contextlib.suppress(ImportError):  # other releases of vLLM look into nothing
        import vllm.triton_utils.dispatcher  # noqa: PLC0415

        # In place of the builtin: it looks into every module's attributes, and one of llvmlite has no dictionary.
        vllm.triton_utils.dispatcher.vars = _dictionary_of
    return vllm


def _dictionary_of(value: object) -> Mapping[str, object]:
    """Give an object's `vars`, or nothing where that is no dictionary."""
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def _import_model(vllm: Any, refusal: ValueError) -> None:
    """Import the class that vLLM could not look into, so that a missing package is told by its name, not "see the log".

    Raises:
        ImportError: the class cannot be imported.
    """
    if "failed to be inspected" not in str(refusal):
        return
    for architecture in re.findall(r"'(\w+)'", str(refusal)):
        known = vllm.ModelRegistry.models.get(architecture)
        if known is not None:
            known.load_model_cls()


def _has_bfloat16_instructions() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def one_line(error: BaseException) -> str:
    """The class and text of a failure in one line; of pydantic's errors the first complaint, without its frame."""
    text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
    text = textwrap.shorten(text.removeprefix("Value error, "), 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
