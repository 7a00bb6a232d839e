"""Batches in flight at a teacher, and store calls that survive a short outage."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from potstill.cache.errors import StoreError, TeacherFailed
from potstill.cache.types import Fields, Targets, Teacher, Tokens

# Seconds before each retry: a scored shard cost teacher time, which one short outage must not throw away.
_STORE_PAUSES = (1.0, 4.0)

_T = TypeVar("_T")


class ScoringWindow:
    """Batches in flight at a teacher, whose answers are taken in the order in which the batches were started."""

    def __init__(self, teacher: Teacher, fields: Fields) -> None:
        self._teacher = teacher
        self._fields = fields
        self._tasks: deque[tuple[list[Tokens], asyncio.Task[list[Targets]]]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, rows: list[Tokens]) -> None:
        """Start to score a batch. An empty batch keeps its place in the order, but does not reach the teacher."""
        self._tasks.append((rows, asyncio.create_task(self._score(rows))))

    async def oldest(self) -> list[Targets]:
        """Wait for the targets of the batch that was started first, one for each of its rows.

        Raises:
            TeacherFailed: the answer has other rows, positions or fields than were asked for.
            PotstillError: whatever the teacher raises.
        """
        rows, task = self._tasks[0]
        answers = await task
        # Only now: when we are cancelled while waiting, `close` still finds the task.
        self._tasks.popleft()
        wanted = [(len(row), self._fields.k) for row in rows]
        if [(answer.num_positions, answer.k) for answer in answers] != wanted:
            raise TeacherFailed("the teacher answered other rows, positions or k than it was asked for")
        for field in self._fields.beside_top_k:
            if any(field.name not in answer.beside_top_k for answer in answers):
                raise TeacherFailed(f"the teacher was asked for {field.name} and did not answer it")
        return answers

    async def close(self) -> None:
        """Cancel the batches that are still in flight, and wait until they have ended."""
        for _, task in self._tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task in self._tasks), return_exceptions=True)

    async def _score(self, rows: list[Tokens]) -> list[Targets]:
        return await self._teacher.score(rows, self._fields) if rows else []


async def with_store_retries(do: Callable[[], _T]) -> _T:
    """Run a blocking call in a thread; when it raises StoreError, again after a pause, three times in all."""
    for pause in _STORE_PAUSES:
        try:
            return await asyncio.to_thread(do)
        except StoreError:
            await asyncio.sleep(pause)
    return await asyncio.to_thread(do)
