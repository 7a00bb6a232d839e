"""Reading batches of rows ahead of whoever uses them.

A trainer computes on one batch while the next ones are read and decoded in one other thread; zarr, zarrs and numpy
give up the interpreter lock for most of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Fields, Targets


class ReadsRows(Protocol):
    """A target set, here or behind a service."""

    def read_rows(self, rows: Sequence[int], *, fields: Fields | None = None) -> list[Targets]:
        """One `Targets` per row index, in order."""
        ...


def stream_rows(
    targets: ReadsRows, batches: Iterable[Sequence[int]], *, fields: Fields | None = None, ahead: int = 2
) -> Iterator[list[Targets]]:
    """What `targets.read_rows` gives for each batch of row indices, in order, read up to `ahead` batches early.

    Reading begins with the first `next`. At most `ahead` batches wait beside the one in hand. `batches` is consumed in
    the reading thread; an error of it or of a read is raised when its own batch is asked for, and ends the
    stream. Closing the iterator, or dropping it, waits for the read that is under way and starts no other.

    Raises:
        InvalidInput: `ahead` is less than 1. While iterating, what `read_rows` raises.
    """
    if ahead < 1:
        raise InvalidInput(f"ahead is {ahead}; at least 1 batch must be read early")
    return _stream(targets, iter(batches), fields, ahead)


def _stream(
    targets: ReadsRows, batches: Iterator[Sequence[int]], fields: Fields | None, ahead: int
) -> Iterator[list[Targets]]:
    def read_next() -> list[Targets] | None:
        batch = next(batches, None)
        return None if batch is None else targets.read_rows(batch, fields=fields)

    # One thread, so that batches are taken and read in order.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        waiting: deque[Future[list[Targets] | None]] = deque(reader.submit(read_next) for _ in range(ahead))
        while (answer := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(read_next))
            yield answer
    finally:
        reader.shutdown(cancel_futures=True)
