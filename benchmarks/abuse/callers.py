"""Callers who behave: they score rows, some of them kept, and read a corpus' targets, with the clients of users."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.abuse.attack import CORPUS, TEACHER
from benchmarks.abuse.service import Service
from potstill.cache import Fields
from potstill.cache.errors import PotstillError
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import SyncHttpTeacher

PAUSE_SECONDS = 0.5
"""A trainer computes between its calls."""
WANT = Fields(k=16)


@dataclass(frozen=True, slots=True)
class Called:
    """Calls of one phase."""

    seconds: NDArray[np.float64]
    """Time of each answered call, retries of the client included."""
    errors: Counter[str]
    """Calls that ended with an error, by its kind and detail."""

    def line(self, phase: str) -> str:
        """The figures as text."""
        p50, p99 = np.percentile(self.seconds, [50, 99]) if len(self.seconds) else (np.nan, np.nan)
        return f"{phase}: {len(self.seconds):,} calls, p50 {p50:.3f} s, p99 {p99:.3f} s, {self.errors.total()} errors"


class Callers:
    """Threads that call until they are stopped."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._seconds: list[float] = []
        self._errors: Counter[str] = Counter()
        self._stop = threading.Event()

    def take(self) -> Called:
        """Give the calls since the last time, or the start."""
        with self._lock:
            called = Called(np.array(self._seconds), self._errors)
            self._seconds, self._errors = [], Counter()
        return called

    @property
    def calls(self) -> int:
        """Calls that were answered since the last `take`."""
        return len(self._seconds)

    def stop(self) -> None:
        """Have the threads end after their present calls."""
        self._stop.set()

    def go_on(self, number: int) -> None:
        """Call until stopped, as the caller of this number."""
        rng = random.Random(number)
        url, key = self._service.door.url, self._service.student_key
        with ExitStack() as stack:
            teacher = stack.enter_context(SyncHttpTeacher(url, TEACHER, api_key=key))
            targets = stack.enter_context(HttpCache(url, api_key=key)).targets(TEACHER, CORPUS)
            held = [shard for shard in range(targets.corpus.num_shards) if targets.is_committed(shard)]
            while not self._stop.wait(PAUSE_SECONDS * rng.random() * 2):
                begin = time.monotonic()
                try:
                    if rng.random() < 0.5:
                        fresh = np.array([rng.randrange(256) for _ in range(32)], np.uint32)
                        teacher.score([targets.corpus.take([0])[0], fresh], WANT)
                    else:
                        targets.read(*targets.corpus.shard_starts[rng.choice(held) :][:2].tolist())
                except PotstillError as error:
                    self._count(error)
                else:
                    self._note(time.monotonic() - begin)

    def _count(self, error: PotstillError) -> None:
        with self._lock:
            self._errors[f"{error.kind}: {error.detail[:200]}"] += 1

    def _note(self, seconds: float) -> None:
        with self._lock:
            self._seconds.append(seconds)


@contextmanager
def calling(service: Service, count: int) -> Iterator[Callers]:
    """Have `count` callers call while the block runs."""
    callers = Callers(service)
    threads = [threading.Thread(target=callers.go_on, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        callers.stop()
        for thread in threads:
            thread.join()
