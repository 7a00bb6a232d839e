"""Batches at the teacher, and calls of the store that survive an outage: what a fill is made of."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from potstill.cache.errors import StoreError, TeacherFailed
from potstill.cache.types import Fields, Targets, Teacher, Tokens

# What was scored is worth more than one outage: a write that fails is tried again, and reads of the corpus too.
_STORE_PAUSES = (1.0, 4.0)

_T = TypeVar("_T")


class ScoringWindow:
    """Batches at the teacher, answered in the order they were started in."""

    def __init__(self, teacher: Teacher, fields: Fields) -> None:
        self._teacher = teacher
        self._fields = fields
        self._tasks: deque[tuple[list[Tokens], asyncio.Task[list[Targets]]]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, rows: list[Tokens]) -> None:
        """Begin to score a batch; an empty one is answered without the teacher."""
        self._tasks.append((rows, asyncio.create_task(self._score(rows))))

    async def oldest(self) -> list[Targets]:
        """The answer to the batch that was started first.

        Raises:
            TeacherFailed: it answered something else than it was asked. Others: what the teacher raises.
        """
        rows, task = self._tasks[0]
        answers = await task
        self._tasks.popleft()
        wanted = [(len(row), self._fields.k) for row in rows]
        if [(answer.num_positions, answer.k) for answer in answers] != wanted:
            raise TeacherFailed("the teacher answered other rows, positions or k than it was asked for")
        for field in self._fields.beside_top_k:
            if any(field.name not in answer.beside_top_k for answer in answers):
                raise TeacherFailed(f"the teacher was asked for {field.name} and did not answer it")
        return answers

    async def close(self) -> None:
        """Cancel what is still waiting."""
        for _, task in self._tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task in self._tasks), return_exceptions=True)

    async def _score(self, rows: list[Tokens]) -> list[Targets]:
        return await self._teacher.score(rows, self._fields) if rows else []


async def with_store_retries(do: Callable[[], _T]) -> _T:
    """Run a blocking call of the store in a thread, again after a pause when the store fails."""
    for pause in _STORE_PAUSES:
        try:
            return await asyncio.to_thread(do)
        except StoreError:
            await asyncio.sleep(pause)
    return await asyncio.to_thread(do)
