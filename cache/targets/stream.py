"""Read-ahead of batches: a trainer computes on one while the next ones are read and decoded in another thread.

zarr, zarrs and numpy release the GIL for most of that, so a thread is enough.
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
        """Read one `Targets` per row index, in order."""


def stream_rows(
    targets: ReadsRows, batches: Iterable[Sequence[int]], *, fields: Fields | None = None, ahead: int = 2
) -> Generator[list[Targets]]:
    """Read the targets of each batch of row indices, in order, ahead of use; see `read_ahead`."""
    return read_ahead(lambda rows: targets.read_rows(rows, fields=fields), batches, ahead)


def read_ahead(
    read: Callable[[Wanted], Found], batches: Iterable[Wanted], ahead: int, *, close_seconds: float | None = None
) -> Generator[Found]:
    """Yield `read(batch)` for each batch, in order, read up to `ahead` batches early by another thread.

    Reading begins with the first `next`. `batches` is consumed in the reading thread; its errors, and those of `read`,
    are raised when their own batch is asked for, and end the stream. Closing or dropping the iterator waits for the
    read that is under way, and starts no other.

    Args:
        read: reads one batch.
        batches: what to read.
        ahead: most batches that wait beside the one in use.
        close_seconds: longest wait on closing, for a caller that ends the read under way by other means.

    Raises:
        InvalidInput: `ahead` is below 1. While iterating, what `read` raises.
    """
    # Not a generator itself, so that a wrong `ahead` is refused here and not at the first `next`.
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
