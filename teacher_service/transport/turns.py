"""Threads for blocking calls, which keys take in turns, so that one key's many calls do not keep another's few waiting.

A call's thread is busy until the call has ended, also when nobody waits for it any more: it cannot be interrupted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from potstill.cache.errors import Overloaded
from potstill.teacher_service.access.auth import current_caller

T = TypeVar("T")
_MOST_WAITING = 256


class FairThreads:
    """A few threads, and the calls of each key that wait for one. Used from one event loop only."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Futures of the calls that wait, by key; the key that is served next comes first."""

    def require_room(self) -> None:
        """Refuse the current caller's next call where very many wait.

        Raises:
            Overloaded: 256 calls of this key wait already.
        """
        waiting = len(self._waiting.get(current_caller().name, ()))
        if waiting >= _MOST_WAITING:
            raise Overloaded(f"{waiting} reads of this key wait for the store already; retry later")

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking call in a thread, once it is the current caller's turn."""
        await self._turn(current_caller().name)
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(self._end)

        working = self._pool.submit(call)
        working.add_done_callback(ended)
        return await asyncio.wrap_future(working)

    async def _turn(self, key: str) -> None:
        if self._free and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(key, deque())
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._end()  # the turn had come
            elif turn in queue:
                queue.remove(turn)
                if not queue:
                    del self._waiting[key]
            raise

    def _end(self) -> None:
        self._free += 1
        while self._free and self._waiting:
            key, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind the other keys
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
