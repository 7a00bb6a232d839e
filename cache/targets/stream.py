"""Reading batches of rows ahead of whoever uses them.

A trainer computes on one batch while the next ones are read and decoded in one other thread; zarr, zarrs and numpy
give up the interpreter lock for most of that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Protocol, TypeVar

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Fields, Targets

Wanted = TypeVar("Wanted")
Found = TypeVar("Found")


class ReadsRows(Protocol):
    """A target set, here or behind a service."""

    def read_rows(self, rows: Sequence[int], *, fields: Fields | None = None) -> list[Targets]:
        """One `Targets` per row index, in order."""
        ...


def stream_rows(
    targets: ReadsRows, batches: Iterable[Sequence[int]], *, fields: Fields | None = None, ahead: int = 2
) -> Generator[list[Targets]]:
    """What `targets.read_rows` gives for each batch of row indices, in order; see `read_ahead`."""
    return read_ahead(lambda rows: targets.read_rows(rows, fields=fields), batches, ahead)


def read_ahead(
    read: Callable[[Wanted], Found], batches: Iterable[Wanted], ahead: int, *, close_seconds: float | None = None
) -> Generator[Found]:
    """Yield `read(batch)` for each batch, in order, read up to `ahead` batches early by one other thread.

    Reading begins with the first `next`. At most `ahead` batches wait beside the one in hand. `batches` is consumed in
    the reading thread; an error of it or of a read is raised when its own batch is asked for, and ends the
    stream. Closing the iterator, or dropping it, waits for the read that is under way and starts no other.

    Args:
        read: reads one batch.
        batches: what to read.
        ahead: batches to read early.
        close_seconds: wait no longer than that on closing, as something else ends the read that is under way.

    Raises:
        InvalidInput: `ahead` is less than 1. While iterating, what `read` raises.
    """
    if ahead < 1:
        raise InvalidInput(f"ahead is {ahead}; at least 1 batch must be read early")
    return _read_ahead(read, batches, ahead, close_seconds)


def _read_ahead(
    read: Callable[[Wanted], Found], batches: Iterable[Wanted], ahead: int, close_seconds: float | None
) -> Generator[Found]:
    arrived: SimpleQueue[tuple[Found] | BaseException | None] = SimpleQueue()
    room = Semaphore(ahead)
    closed = Event()

    def work() -> None:
        try:
            for batch in batches:
                room.acquire()
                if closed.is_set():
                    return
                arrived.put((read(batch),))
        except BaseException as error:  # noqa: BLE001 -- carried to the thread that asked, whatever it is
            arrived.put(error)
        else:
            arrived.put(None)

    thread = Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]
    finally:
        closed.set()
        room.release()
        thread.join(close_seconds)
