"""Reading ahead of use: several readers side by side, answers in order, within a bound of what is held.

Reading and decoding release the GIL for most of their time, so threads are enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from potstill.student_trainer.data.batch import Batch

_MOST_BYTES = 512 << 20
_TOGETHER_BYTES = 16 << 20
"""Most bytes of answers that one thread reads together: what it holds beside them, while it decodes, is as much."""

Wanted = TypeVar("Wanted")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class ReadAhead(Generic[Wanted, Found]):
    """An iterator of what `read` gives for each that is wanted, in order, read early by several threads from now on.

    What is wanted is itself made in those threads, by one at a time. Its errors, and those of `read`, are raised where
    their own answer would have come, and end the reading. Close it in the end.

    Args:
        read: gives an answer for each of some; called by several threads.
        wanted: what to read.
        readers: threads.
        ahead: most answers that wait, or are being read, beside the one in use.
        together: most that `read` is called with: the more, the less a thread holds Python's lock for each.
        size: bytes of an answer.
        most_bytes: of answers that wait, or are being read, while there is more than one.
    """

    def __init__(
        self,
        read: Callable[[Sequence[Wanted]], Iterable[Found]],
        wanted: Iterable[Wanted],
        *,
        readers: int,
        ahead: int,
        together: int = 1,
        size: Callable[[Found], int] = lambda _: 0,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self.waited = 0.0
        """Seconds that the caller has waited."""
        self._read, self._wanted, self._size = read, iter(wanted), size
        self._ahead, self._together, self._most_bytes = ahead, min(together, ahead), most_bytes
        self._begun, self._taken = 0, 0
        self._arrived: dict[int, tuple[Found | _Failed, int]] = {}  # with its bytes
        self._held, self._largest = 0, 0
        self._ended = self._closed = False
        # One lock; two conditions, so that an answer wakes no reader, and room not the caller.
        self._lock = threading.Lock()
        self._arrival, self._room = threading.Condition(self._lock), threading.Condition(self._lock)
        self._wanting = threading.Lock()
        names = (f"read-ahead-{i}" for i in range(readers))
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Found]:
        return self

    def __next__(self) -> Found:
        """Wait for the next answer.

        Raises:
            StopIteration: there is no more. Otherwise what reading raised.
        """
        began = time.monotonic()
        with self._lock:
            self._arrival.wait_for(lambda: self._taken in self._arrived or self._is_over)
            self.waited += time.monotonic() - began
            if self._taken not in self._arrived:
                raise StopIteration
            found, size = self._arrived.pop(self._taken)
            if isinstance(found, _Failed):
                self._closed = True
                self._room.notify()
                raise found.error
            self._taken += 1
            self._held -= size
            if self._has_room:
                self._room.notify()
            return found

    def close(self, seconds: float | None = None) -> None:
        """Begin no more reads, and wait for those under way, at most so long."""
        with self._lock:
            self._closed = True
            self._arrival.notify_all()
            self._room.notify()
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    @contextmanager
    def until_closed(self, seconds: float | None = None) -> Iterator[Self]:
        """Give itself, and close it at the end of the block."""
        try:
            yield self
        finally:
            self.close(seconds)

    @property
    def _is_over(self) -> bool:
        return self._closed or (self._ended and self._taken == self._begun)

    @property
    def _share(self) -> int:
        """Number of those that a thread begins to read together."""
        return min(self._together, max(_TOGETHER_BYTES // self._largest, 1)) if self._largest else 1

    @property
    def _has_room(self) -> bool:
        outstanding = self._begun - self._taken
        begun = outstanding - len(self._arrived) + self._share
        fits = self._held + begun * self._largest <= self._most_bytes
        return outstanding == 0 or (outstanding + self._share <= self._ahead and fits)

    def _work(self) -> None:
        while (begun := self._begin()) is not None:
            self._read_some(*begun)

    def _begin(self) -> tuple[int, list[Wanted | _Failed]] | None:
        """Wait for room, and take what is wanted next, of which the last may be an error; None at the end."""
        with self._wanting:
            with self._lock:
                self._room.wait_for(lambda: self._closed or self._ended or self._has_room)
                if self._closed or self._ended:
                    return None
                share = self._share
            some: list[Wanted | _Failed] = []
            while len(some) < share and not (some and isinstance(some[-1], _Failed)):
                some.append(_tried(partial(next, self._wanted)))
            with self._lock:
                last = some[-1]
                self._ended = isinstance(last, _Failed)
                if isinstance(last, _Failed) and isinstance(last.error, StopIteration):
                    some.pop()
                    self._arrival.notify_all()
                self._begun += len(some)
                return self._begun - len(some), some

    def _read_some(self, first: int, some: list[Wanted | _Failed]) -> None:
        answers = self._answers([each for each in some if not isinstance(each, _Failed)])
        for number, each in enumerate(some, first):
            found = each if isinstance(each, _Failed) else _tried(partial(next, answers))
            self._arrive(number, found)
            if isinstance(found, _Failed):
                return  # it ends the reading for who asks, too

    def _answers(self, wanted: list[Wanted]) -> Iterator[Found]:
        yield from self._read(wanted)

    def _arrive(self, number: int, found: Found | _Failed) -> None:
        size = 0 if isinstance(found, _Failed) else self._size(found)
        with self._lock:
            self._arrived[number] = found, size
            self._held, self._largest = self._held + size, max(self._largest, size)
            if self._has_room:  # of bytes: an answer may be smaller than the largest, as which it counted
                self._room.notify()
            if number == self._taken:
                self._arrival.notify_all()


class Copies:
    """Copies of batches on a device. From pinned memory a stream of their own makes them while the device computes.

    Args:
        device: a CPU gets the batch itself. A GPU's part was not run on one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def of(self, batch: Batch) -> Batch:
        """Copy a batch; what is computed on it from now on waits for the copy."""
        if self._stream is None:
            return batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = batch.each(lambda tensor: tensor.to(self._device, non_blocking=True))
        computing.wait_stream(self._stream)
        copied.each(lambda tensor: _used_by(tensor, computing))
        return copied


def _used_by(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    # Its memory was taken in the copying stream, which must not give it away while another reads it.
    tensor.record_stream(stream)
    return tensor


def _tried(make: Callable[[], Found]) -> Found | _Failed:
    try:
        return make()
    except BaseException as error:  # noqa: BLE001 -- carried to the thread that asked, whatever it is
        return _Failed(error)
