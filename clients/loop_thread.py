"""An event loop in a background thread, for code that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from potstill.cache.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class LoopThread:
    """Runs coroutines for any number of threads, which wait for them, from its making until `close`.

    Args:
        name: of the thread.
        closed: what calls say that come after `close`, or that wait meanwhile.
    """

    def __init__(self, name: str, *, closed: str) -> None:
        self._told = closed
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a coroutine function and wait for its end; raises what it raises.

        Raises:
            Unavailable: closed, before or meanwhile.
        """
        with self._lock:
            if not self._open:
                raise Unavailable(self._told)
            future = asyncio.run_coroutine_threadsafe(call(*args, **kwargs), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise Unavailable(self._told) from error
        finally:
            future.cancel()  # Ctrl-C in the waiting thread ends the work too

    def close(self, last: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Cancel all work, run `last`, then end the thread. A second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        try:
            asyncio.run_coroutine_threadsafe(_after_others(last), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _after_others(last: Callable[[], Coroutine[Any, Any, object]]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await last()
