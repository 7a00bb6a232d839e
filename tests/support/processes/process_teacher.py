"""A `FakeTeacher` in a process of its own, which a test can really stop or kill.

It is `python -m tests.support.processes.process_teacher`, and dies of a row that begins with `DEADLY`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import struct
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, BinaryIO

from potstill.cache import Fields, Targets
from potstill.cache.errors import PotstillError, TeacherFailed, Unavailable
from potstill.cache.types import Teacher, Tokens
from potstill.cache.wrapped_teacher import WrappedTeacher
from tests.support.fakes import FakeTeacher

DEADLY = 50
_LENGTH = struct.Struct("<Q")


class ProcessTeacher(WrappedTeacher):
    """Opened by `open_process_teacher`. Watched, as an engine is."""

    def __init__(self, process: asyncio.subprocess.Process, model: FakeTeacher) -> None:
        super().__init__(model)
        self.failure = ""
        self.progress = 0
        self.pid = process.pid
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[Targets]]] = {}
        self._closed = False
        self.started = asyncio.Event()

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        if self.failure or self._closed:
            raise TeacherFailed(self.failure) if self.failure else Unavailable("closed")
        number = next(self._numbers)
        future: asyncio.Future[list[Targets]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        assert self._process.stdin is not None
        message = pickle.dumps((number, list(rows), want))
        try:
            self._process.stdin.write(_LENGTH.pack(len(message)) + message)
            return await future
        except (OSError, RuntimeError) as error:  # uvloop's word for a closed pipe; its end is read a moment later
            self.failure = self.failure or f"the engine's process {self.pid} ended"
            raise TeacherFailed(self.failure) from error
        finally:
            del self._waiting[number]

    async def read_answers(self) -> None:
        assert self._process.stdout is not None
        try:
            await self._process.stdout.readexactly(1)
            self.started.set()
            while True:
                (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
                number, outcome = pickle.loads(await self._process.stdout.readexactly(length))
                self.progress += 1
                future = self._waiting.get(number)
                if future is not None and not future.done():
                    _settle(future, outcome)
        except asyncio.IncompleteReadError:
            self.failure = "" if self._closed else f"the engine's process {self.pid} ended"
            self.started.set()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(TeacherFailed(self.failure or "closed"))

    async def close(self) -> None:
        self._closed = True
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def _settle(future: asyncio.Future[list[Targets]], outcome: list[Targets] | PotstillError) -> None:
    if isinstance(outcome, PotstillError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


@asynccontextmanager
async def open_process_teacher(
    tokens_per_second: float = 0.0, opened: Callable[[ProcessTeacher], Any] = lambda _: None
) -> AsyncIterator[ProcessTeacher]:
    command = (sys.executable, "-m", "tests.support.processes.process_teacher", str(tokens_per_second))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    teacher = ProcessTeacher(process, FakeTeacher())
    reading = asyncio.create_task(teacher.read_answers())
    try:
        await teacher.started.wait()
        if teacher.failure:
            raise TeacherFailed(teacher.failure)
        opened(teacher)
        yield teacher
    finally:
        await teacher.close()
        await reading


def opens_process_teacher(**options: Any) -> Callable[[], AbstractAsyncContextManager[Teacher]]:
    return partial(open_process_teacher, **options)


async def _main(tokens_per_second: float) -> None:
    teacher = FakeTeacher(tokens_per_second=tokens_per_second)
    answering: set[asyncio.Task[None]] = set()
    sys.stdout.buffer.write(b"!")
    sys.stdout.buffer.flush()
    while (message := await asyncio.to_thread(_read, sys.stdin.buffer)) is not None:
        task = asyncio.create_task(_answer(teacher, *message))
        answering.add(task)
        task.add_done_callback(answering.discard)


async def _answer(teacher: FakeTeacher, number: int, rows: list[Tokens], want: Fields) -> None:
    if any(len(row) and row[0] == DEADLY for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        outcome: Any = await teacher.score(rows, want)
    except PotstillError as error:
        outcome = error
    answer = pickle.dumps((number, outcome))
    sys.stdout.buffer.write(_LENGTH.pack(len(answer)) + answer)
    sys.stdout.buffer.flush()


def _read(stream: BinaryIO) -> Any:
    head = stream.read(_LENGTH.size)
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0])) if head else None


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1])))
