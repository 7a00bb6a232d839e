"""One vLLM engine and the one thread that steps it.

The thread builds the engine, then loops: take what callers sent, hand it to the engine, step, answer.
All callers share the engine's continuous batching. Callers are on other threads, on an event loop or
not; they hold a `concurrent.futures.Future`, whose cancellation takes only their own rows out.

Run with vLLM 0.32 on CPUs; not run on a GPU.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from potstill.cache.errors import InvalidInput, PotstillError, TeacherFailed, Unavailable
from potstill.cache.extras import missing_module
from potstill.cache.types import Targets
from potstill.teacher_service.capture.layout import Asked
from potstill.teacher_service.engine.vllm_engine import EngineFacts, VllmEngine, one_line

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.002
"""Time between two looks for the answers of an engine in another process, while rows wait for it."""
_IDLE_SECONDS = 1.0
"""Time between two looks at such a process while nothing waits."""
_CLOSE_SECONDS = 60.0
"""Time for a step and the shutdown after it. A thread that is stuck in the engine never ends, so it is not joined."""


@dataclass(slots=True, eq=False)
class Job:
    """Rows of one caller; `done` gets their targets in order, or the first failure."""

    rows: list[Asked]
    done: Future[list[Targets]] = field(default_factory=Future)
    answers: dict[int, Targets] = field(default_factory=dict)

    def finish(self, outcome: list[Targets] | Exception) -> None:
        """Set the outcome, unless there is one or the caller has cancelled."""
        if self.done.done() or not self.done.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class EngineThread:
    """Owns one vLLM engine. `submit` may be called from any thread.

    Args:
        name: the model, for messages.
        build: makes the engine; called in the thread.
    """

    def __init__(self, name: str, build: Callable[[], VllmEngine]) -> None:
        self._name = name
        self._build = build
        # A job comes a second time when its caller cancels it; None asks the thread to end.
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._started: Future[EngineFacts] = Future()
        self._ended: PotstillError | None = None
        self._end_lock = threading.Lock()
        self._rows: dict[str, tuple[Job, int]] = {}
        self.num_steps = 0
        """Steps done so far, in whichever process: each scores at most `max_batch_tokens` tokens."""
        self._request_ids = itertools.count()
        # A daemon, because a thread that is stuck in the engine must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name=f"vllm {name}", daemon=True)

    @property
    def failure(self) -> str:
        """Reason for which the engine ended by itself, in one line; empty while it runs and after `close`."""
        ended = self._ended
        return ended.detail if isinstance(ended, TeacherFailed) else ""

    def start(self) -> Future[EngineFacts]:
        """Start the thread; the future fails with `InvalidInput` or `TeacherFailed`."""
        self._started.set_running_or_notify_cancel()
        self._close_first_at_exit()
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
                # A copy: one exception raised in several callers would collect all of their tracebacks.
                raise type(self._ended)(str(self._ended))
            self._inbox.put(job)
        job.done.add_done_callback(lambda done: self._inbox.put(job) if done.cancelled() else None)

    def close(self) -> None:
        """Stop the engine after the running step, and wait until it is shut down; a stuck thread is left behind.

        Rows in flight fail with `Unavailable`.
        """
        self._inbox.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _LOG.error("the engine of %r did not stop within %g seconds and is left behind", self._name, _CLOSE_SECONDS)
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            engine = self._open_engine()
        except PotstillError as error:
            self._end(error)
            self._started.set_exception(error)
            return
        self._close_first_at_exit()
        self._started.set_result(engine.facts)
        ended: PotstillError = Unavailable(f"the teacher {self._name!r} is closed")
        try:
            self._serve(engine)
        except Exception as error:  # noqa: BLE001 -- whatever ends the engine, its callers must be told
            ended = TeacherFailed(f"the engine of {self._name!r} failed: {one_line(error)}")
            _LOG.exception("%s", ended)
        finally:
            self._end(ended)
            engine.close()

    def _close_first_at_exit(self) -> None:
        """End the thread at the interpreter's exit, before the exit hooks of vLLM and torch take away what it uses.

        Hooks run in reverse order, so this is called again once those two have registered theirs.
        """
        atexit.unregister(self.close)
        atexit.register(self.close)

    def _open_engine(self) -> VllmEngine:
        try:
            return self._build()
        except ModuleNotFoundError as error:
            raise InvalidInput(f"the teacher {self._name!r} {missing_module(error)}") from error
        except ImportError as error:
            raise InvalidInput(f"vLLM cannot be imported: {one_line(error)}") from error
        except (ValueError, OSError) as error:
            raise InvalidInput(f"vLLM does not take {self._name!r}: {one_line(error)}") from error
        except TeacherFailed as error:
            raise TeacherFailed(f"the engine of {self._name!r} did not start: {error.detail}") from error
        except (Exception, SystemExit) as error:  # vLLM exits where others raise; callers must not wait for ever
            raise TeacherFailed(f"the engine of {self._name!r} did not start: {one_line(error)}") from error

    def _serve(self, engine: VllmEngine) -> None:
        while True:
            for job in self._messages(engine):
                if job is None:
                    return
                if job.done.cancelled():
                    self._withdraw(engine, job)
                else:
                    self._add(engine, job)
            # Asked while nothing waits, too: it raises when the engine's own process is gone.
            if engine.can_step():
                self.num_steps += 1
                for request_id, output in engine.step():
                    self._deliver(engine, request_id, output)

    def _messages(self, engine: VllmEngine) -> Iterator[Job | None]:
        """Take all messages out of the inbox; waits for one where the engine has nothing to do."""
        timeout = _IDLE_SECONDS
        if self._rows:
            timeout = 0.0 if engine.can_step() else _POLL_SECONDS
        try:
            yield self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _add(self, engine: VllmEngine, job: Job) -> None:
        for index, asked in enumerate(job.rows):
            if job.done.done():
                return
            request_id = str(next(self._request_ids))
            self._rows[request_id] = (job, index)
            try:
                engine.add(request_id, asked)
            except ValueError as error:
                self._withdraw(engine, job)
                job.finish(InvalidInput(f"vLLM does not take row {index}: {one_line(error)}"))
                return

    def _withdraw(self, engine: VllmEngine, job: Job) -> None:
        request_ids = [request_id for request_id, (owner, _) in self._rows.items() if owner is job]
        for request_id in request_ids:
            del self._rows[request_id]
        if request_ids:
            engine.abort(request_ids)

    def _deliver(self, engine: VllmEngine, request_id: str, output: Any) -> None:
        job, index = self._rows.pop(request_id, (None, 0))
        if job is None:
            return
        try:
            job.answers[index] = engine.targets(output, job.rows[index])
        except TeacherFailed as error:
            self._withdraw(engine, job)
            job.finish(error)
            return
        if len(job.answers) == len(job.rows):
            job.finish([job.answers[i] for i in range(len(job.rows))])

    def _end(self, ended: PotstillError) -> None:
        # From here on `submit` refuses, so that no job comes into the inbox after it is emptied below.
        with self._end_lock:
            self._ended = ended
        jobs = {id(job): job for job, _ in self._rows.values()}
        while not self._inbox.empty():
            job = self._inbox.get_nowait()
            if job is not None:
                jobs[id(job)] = job
        self._rows.clear()
        for job in jobs.values():
            job.finish(type(ended)(str(ended)))
