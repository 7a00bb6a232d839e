"""Parts that a forked child cannot inherit (threads, locks, sockets) and so makes anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value that every process makes for itself: in a forked child the first `get` makes another; thread-safe.

    The parent's stays in memory, untouched, as dropping it could close a socket that both share.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Make this process's value."""
        self._make = make
        self._by_process = {os.getpid(): make()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without a value; the process that it comes to makes one."""
        return type(self), (self._make,)

    def get(self) -> T:
        """This process's value; raises what making it raises."""
        process = os.getpid()
        if process not in self._by_process:
            # Two threads may both make one; the first that is kept serves both.
            return self._by_process.setdefault(process, self._make())
        return self._by_process[process]


class cached(cached_property[T]):  # noqa: N801 -- a decorator
    """`functools.cached_property` as it is from Python 3.12 on: two threads may both compute a value, none waits.

    Python 3.11 holds one lock for all instances meanwhile, which stays locked in a child that is forked then.
    """

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> T: ...

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Self | T:
        """Compute the value, and keep it in the instance, where Python finds it before it asks here."""
        if instance is None:
            return self
        kept: T = vars(instance).setdefault(self.func.__name__, self.func(instance))
        return kept


def is_inherited(library: str) -> bool:
    """Tell whether a parent of this process started a library's threads, so that here a call of it never returns.

    The first call starts them, as far as this knows: it is made right before the library is used.
    """
    return _started_by(library) != os.getpid()


@cache
def _started_by(library: str) -> int:  # noqa: ARG001 -- the cache's key
    return os.getpid()
