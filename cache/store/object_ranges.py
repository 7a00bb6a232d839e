"""Ranges of objects of a folder or an object store, read by the thread that asks.

An event loop in between, with a task for each range, holds Python's lock longer than all the rest of a read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from obstore.exceptions import BaseError, NotSupportedError

from potstill.cache.errors import CorruptSegment
from potstill.cache.forks import PerProcess
from potstill.cache.store.object_stores import is_absent, store_error

Stored: TypeAlias = NDArray[np.uint8]
"""Bytes as they are stored."""
_THREADS: Final = PerProcess(partial(ThreadPoolExecutor, 32, thread_name_prefix="ranges"))
"""They stay: to start some for each read costs more than the read."""
T = TypeVar("T")


class ObjectRanges:
    """Reads parts of objects; thread-safe.

    Raises:
        CorruptSegment: an object is missing, or ends before what is asked for. StoreError: the store fails.
    """

    def __init__(self, store: Any) -> None:
        """Take a folder (a `Path`) or an obstore store."""
        self._folder = store if isinstance(store, Path) else None
        self._store = store

    @property
    def in_folder(self) -> bool:
        """True where no network is in between."""
        return self._folder is not None

    def read(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Stored]:
        """Read ranges (start, stop) of one object; a store is asked for those that adjoin by one request."""
        starts, ends = zip(*ranges, strict=True)
        with self._errors(key, max(ends)):
            if self._folder is None:
                # Not what lies in between: it would be read again when it is wanted.
                found = self._store.get_ranges(key, starts=starts, ends=ends, coalesce=0)
            else:
                with (self._folder / key).open("rb", buffering=0) as file:
                    found = [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]
        if any(len(data) != stop - start for data, (start, stop) in zip(found, ranges, strict=True)):
            raise _cut_short(key)
        return [np.frombuffer(data, np.uint8) for data in found]

    def read_end(self, key: str, length: int) -> Stored:
        """Read the last bytes of one object."""
        with self._errors(key, length):
            if self._folder is None:
                data = self._end(key, length)
            else:
                with (self._folder / key).open("rb", buffering=0) as file:
                    data = os.pread(file.fileno(), length, max(os.fstat(file.fileno()).st_size - length, 0))
        if len(data) != length:
            raise _cut_short(key)
        return np.frombuffer(data, np.uint8)

    def _end(self, key: str, length: int) -> Any:
        try:
            return self._store.get(key, options={"range": {"suffix": length}}).bytes()
        except NotSupportedError:  # by Azure
            size = self._store.head(key)["size"]
            return self._store.get_range(key, start=max(size - length, 0), end=size)

    @contextmanager
    def _errors(self, key: str, end: int) -> Iterator[None]:
        """Say what a failed read means: a store that does not answer is no damage, an object that is too short is."""
        try:
            yield
        except (BaseError, OSError) as error:
            if is_absent(error):
                raise CorruptSegment(f"{key} is missing") from error
            if self._folder is None and self._is_shorter(key, end):
                raise _cut_short(key) from error
            raise store_error(key, error) from error

    def _is_shorter(self, key: str, end: int) -> bool:
        try:
            return int(self._store.head(key)["size"]) < end
        except (BaseError, OSError):
            return False


def side_by_side(reads: Sequence[Callable[[], T]]) -> list[T]:
    """Make reads of stores at once; raises what the first of them raises, when all have ended."""
    others = [_THREADS.get().submit(read) for read in reads[1:]]
    try:
        found = [read() for read in reads[:1]]
    finally:
        wait(others)
    return [*found, *(each.result() for each in others)]


def _cut_short(key: str) -> CorruptSegment:
    return CorruptSegment(f"{key} is cut short: a chunk lies beyond its end")
