"""One vLLM engine and the one thread that steps it.

The thread builds the engine, then loops: take what callers sent, hand it to the engine, step, answer.
All callers share the engine's continuous batching. Callers are on other threads, on an event loop or
not; they hold a `concurrent.futures.Future`, whose cancellation takes only their own rows out.

vLLM keeps its process groups, its forward context and its clean-up in module state, so one process
holds one engine: two built side by side do score, but closing either breaks the other ("pipeline
model parallel group is not initialized"). The first open engine of a process therefore runs inside
it, and every further one in a process of its own, which costs about ten seconds more to start and
one more import of vLLM. Such a process is spawned, so a script that opens a second teacher needs
the usual `if __name__ == "__main__":`.

Runs on vLLM 0.32, V1 engine; CPUs only so far, never on a GPU.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.errors import InvalidInput, PotstillError, TeacherFailed, Unavailable
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
"""How often the answers of an engine in another process are looked for while nothing else happens."""


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


@dataclass(slots=True, eq=False)
class Job:
    """Rows of one caller; `done` gets their targets in order, or the first failure."""

    prompts: list[list[int]]
    """Prefix and row, one list of ids each."""
    num_prefix: int
    k: int
    done: Future[list[Targets]] = field(default_factory=Future)
    answers: dict[int, Targets] = field(default_factory=dict)

    def finish(self, outcome: list[Targets] | Exception) -> None:
        """Set the outcome once; a caller that has cancelled gets nothing."""
        if self.done.done() or not self.done.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


@dataclass(frozen=True, slots=True)
class _Cancelled:
    job: Job


class _Stop:
    """Asks the thread to end."""


_Message = Job | _Cancelled | _Stop


class EngineThread:
    """Owns one vLLM engine. `submit` may be called from any thread.

    Args:
        name: the model, for messages.
        arguments: keyword arguments of `vllm.EngineArgs`.
        cpu_kv_cache_bytes: KV cache size on a CPU platform; a GPU's follows `gpu_memory_utilization`.
    """

    def __init__(self, name: str, arguments: dict[str, Any], *, cpu_kv_cache_bytes: int) -> None:
        self._name = name
        self._arguments = arguments
        self._cpu_kv_cache_bytes = cpu_kv_cache_bytes
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._started: Future[EngineFacts] = Future()
        self._ended: PotstillError | None = None
        self._end_lock = threading.Lock()
        self._rows: dict[str, tuple[Job, int]] = {}
        self._request_ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name=f"vllm {name}", daemon=True)

    def start(self) -> Future[EngineFacts]:
        """Start the thread; the future fails with `InvalidInput` or `TeacherFailed`."""
        self._started.set_running_or_notify_cancel()
        atexit.register(self.close)  # a thread still in vLLM when the interpreter ends aborts the process
        self._thread.start()
        return self._started

    def submit(self, job: Job) -> None:
        """Queue a job; it ends when its rows are scored, or the engine has ended.

        Raises:
            TeacherFailed: the engine has failed.
            Unavailable: the engine was closed.
        """
        with self._end_lock:
            if self._ended is not None:
                raise type(self._ended)(str(self._ended))
            self._inbox.put(job)
        job.done.add_done_callback(
            lambda done: self._inbox.put(_Cancelled(job)) if done.cancelled() else None
        )

    def stop(self) -> None:
        """Ask for the end, after the running step; rows in flight fail with `Unavailable`. Does not wait."""
        self._inbox.put(_Stop())

    def join(self) -> None:
        """Wait until the engine is shut down and the thread has ended."""
        self._thread.join()
        atexit.unregister(self.close)

    def close(self) -> None:
        """`stop` and `join`."""
        self.stop()
        self.join()

    def _run(self) -> None:
        try:
            engine = self._open_engine()
        except PotstillError as error:
            self._end(error)
            self._started.set_exception(error)
            return
        self._started.set_result(engine.facts)
        ended: PotstillError = Unavailable(f"the teacher {self._name!r} is closed")
        try:
            self._serve(engine)
        except Exception as error:  # noqa: BLE001 -- whatever ends the engine, its callers must be told
            ended = TeacherFailed(f"the engine of {self._name!r} failed: {_one_line(error)}")
            _LOG.exception("%s", ended)
        finally:
            self._end(ended)
            engine.close()

    def _open_engine(self) -> _Engine:
        try:
            return _Engine(self._arguments, cpu_kv_cache_bytes=self._cpu_kv_cache_bytes)
        except ImportError as error:
            raise InvalidInput(f"vLLM cannot be imported: {_one_line(error)}") from error
        except (ValueError, OSError) as error:
            raise InvalidInput(f"vLLM does not take {self._name!r}: {_one_line(error)}") from error
        except Exception as error:
            raise TeacherFailed(f"the engine of {self._name!r} did not start: {_one_line(error)}") from error

    def _serve(self, engine: _Engine) -> None:
        while True:
            for message in self._messages(engine):
                if isinstance(message, _Stop):
                    return
                if isinstance(message, Job):
                    self._add(engine, message)
                else:
                    self._withdraw(engine, message.job)
            if self._rows and engine.can_step():
                for request_id, output in engine.step():
                    self._deliver(engine, request_id, output)

    def _messages(self, engine: _Engine) -> Iterator[_Message]:
        """What is in the inbox; waits for it when there is nothing else to do."""
        timeout: float | None = None
        if self._rows:
            timeout = 0.0 if engine.can_step() else _POLL_SECONDS
        try:
            yield self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _add(self, engine: _Engine, job: Job) -> None:
        for index, prompt in enumerate(job.prompts):
            if job.done.done():
                return
            request_id = str(next(self._request_ids))
            self._rows[request_id] = (job, index)
            try:
                engine.add(request_id, prompt, job.k)
            except ValueError as error:
                self._withdraw(engine, job)
                job.finish(InvalidInput(f"vLLM does not take row {index}: {_one_line(error)}"))
                return

    def _withdraw(self, engine: _Engine, job: Job) -> None:
        request_ids = [request_id for request_id, (owner, _) in self._rows.items() if owner is job]
        for request_id in request_ids:
            del self._rows[request_id]
        if request_ids:
            engine.abort(request_ids)

    def _deliver(self, engine: _Engine, request_id: str, output: Any) -> None:
        job, index = self._rows.pop(request_id, (None, 0))
        if job is None:
            return
        try:
            job.answers[index] = _targets(
                output,
                tokens=job.prompts[index],
                num_prefix=job.num_prefix,
                k=job.k,
                vocab_size=engine.facts.vocab_size,
            )
        except TeacherFailed as error:
            self._withdraw(engine, job)
            job.finish(error)
            return
        if len(job.answers) == len(job.prompts):
            job.finish([job.answers[i] for i in range(len(job.prompts))])

    def _end(self, ended: PotstillError) -> None:
        with self._end_lock:
            self._ended = ended
        jobs = {id(job): job for job, _ in self._rows.values()}
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, Job):
                jobs[id(message)] = message
        self._rows.clear()
        for job in jobs.values():
            job.finish(type(ended)(str(ended)))


class _Engine:
    """vLLM's `LLMEngine` behind the few calls that scoring needs. Used by one thread only."""

    def __init__(self, arguments: dict[str, Any], *, cpu_kv_cache_bytes: int) -> None:
        self._inside = _INSIDE_THIS_PROCESS.acquire(blocking=False)
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


def _targets(output: Any, *, tokens: list[int], num_prefix: int, k: int, vocab_size: int) -> Targets:
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


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
