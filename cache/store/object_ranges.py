"""Ranges of objects of a folder or an object store, read by the thread that asks.

An event loop in between, with a task for each range, holds Python's lock longer than all the rest of a read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from obstore.exceptions import BaseError, NotSupportedError

from potstill.cache.errors import CorruptSegment
from potstill.cache.forks import PerProcess
from potstill.cache.store.object_stores import is_absent, store_error

Stored: TypeAlias = NDArray[np.uint8]
"""Bytes as they are stored."""
_MOST_THREADS = 32
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
        end = max(stop for _, stop in ranges)
        with self._errors(key, end):
            found = self._of_store(key, ranges) if self._folder is None else _of_file(self._folder / key, end, ranges)
        if any(len(data) != stop - start for data, (start, stop) in zip(found, ranges, strict=True)):
            raise _cut_short(key)
        return found

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

    def _of_store(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Stored]:
        # obstore joins ranges, too, but panics where an object ends before one that it joined to others begins. What
        # lies between ranges is not read: it would be read again when it is wanted.
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if spans and start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(spans[-1][1], stop)
            else:
                spans.append((start, stop))
        starts, ends = zip(*spans, strict=True)
        found = self._store.get_ranges(key, starts=starts, ends=ends, coalesce=0)
        data = [np.frombuffer(each, np.uint8) for each in found]
        places = np.searchsorted(starts, [start for start, _ in ranges], side="right") - 1
        return [
            data[at][start - starts[at] : stop - starts[at]]
            for at, (start, stop) in zip(places.tolist(), ranges, strict=True)
        ]

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


class _Threads:
    """Daemon threads, as a process is not to wait for a store that does not answer before it ends.

    They stay: to start some for each read costs more than the read.
    """

    def __init__(self) -> None:
        self._calls = SimpleQueue[Callable[[], None]]()
        self._number = 0

    def submit(self, read: Callable[[], T]) -> Future[T]:
        """Make a read in one of them."""
        future = Future[T]()

        def call() -> None:
            try:
                future.set_result(read())
            except BaseException as error:  # noqa: BLE001 -- carried to the thread that asked, whatever it is
                future.set_exception(error)

        self._calls.put(call)
        if self._number < _MOST_THREADS:
            self._number += 1
            threading.Thread(target=self._work, name=f"ranges-{self._number}", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            self._calls.get()()


_THREADS: Final = PerProcess(_Threads)


def side_by_side(reads: Sequence[Callable[[], T]]) -> list[T]:
    """Make reads of stores at once; raises what the first of them raises, when all have ended."""
    # The main thread makes none: Ctrl-C would have to wait for the store.
    own = int(threading.current_thread() is not threading.main_thread())
    others = [_THREADS.get().submit(read) for read in reads[own:]]
    try:
        found = [read() for read in reads[:own]]
    finally:
        wait(others)
    return [*found, *(each.result() for each in others)]


def _of_file(file: Path, end: int, ranges: Sequence[tuple[int, int]]) -> list[Stored]:
    with file.open("rb", buffering=0) as opened:
        if end > os.fstat(opened.fileno()).st_size:  # by how much it may be: more than there is memory
            return [np.empty(0, np.uint8)] * len(ranges)
        found = [os.pread(opened.fileno(), stop - start, start) for start, stop in ranges]
    return [np.frombuffer(data, np.uint8) for data in found]


def _cut_short(key: str) -> CorruptSegment:
    return CorruptSegment(f"{key} is cut short: a chunk lies beyond its end")
