"""Coverage: the shards of each corpus that have committed targets, folded so that a page can draw 10^5 of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import PotstillError

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

MAX_CELLS = 200
_PAUSE_SECONDS = 2.0
# A store that takes long to list is asked seldom: 5% of its time at most.
_PAUSE_PER_SECOND = 20.0
_PATIENCE_SECONDS = 1.0  # a page is shown with the last coverage rather than later than this


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCoverage:
    """One teacher's coverage of a corpus."""

    teacher: str
    committed: int
    """Shards with a commit."""
    cells: tuple[float, ...]
    """Fraction committed of each run of shards, in order; see `fold`."""
    error: str = ""
    """Reason for which it could not be read; empty when it could."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusCoverage:
    """One corpus, and each teacher's coverage of it."""

    corpus: str
    rows: int
    positions: int
    shards: int
    teachers: tuple[TeacherCoverage, ...]
    error: str = ""
    """Reason for which it could not be read; empty when it could."""


def fold(committed: NDArray[np.bool_], max_cells: int = MAX_CELLS) -> tuple[float, ...]:
    """Fold [S] commits into C = min(S, max_cells) fractions; cell c tells of shards [c S // C, (c + 1) S // C)."""
    cells = min(len(committed), max_cells)
    if not cells:
        return ()
    edges = np.arange(cells + 1) * len(committed) // cells
    counts = np.add.reduceat(committed.astype(np.int64), edges[:-1])
    return tuple((counts / np.diff(edges)).round(4).tolist())


def read_coverage(cache: Cache) -> tuple[CorpusCoverage, ...]:
    """Read the coverage of every corpus by every teacher, in the order of their names. Blocks.

    Raises:
        StoreError: the store does not answer.
    """
    seen = cache.look_at_corpora(lambda name: _of_corpus(cache, name))
    unreadable = (
        CorpusCoverage(corpus=name, rows=0, positions=0, shards=0, teachers=(), error=error.detail)
        for name, error in seen.unreadable.items()
    )
    return tuple(sorted((*seen.found.values(), *unreadable), key=lambda coverage: coverage.corpus))


class Coverage:
    """The coverage of a cache, read again as often as its store bears. Used from one event loop only."""

    def __init__(self, cache: Cache | None) -> None:
        self.error = ""
        """Failure of the last reading; empty when it succeeded."""
        self._cache = cache
        self._found: tuple[CorpusCoverage, ...] | None = None if cache else ()
        self._reading: asyncio.Task[None] | None = None
        self._next = 0.0

    async def latest(self) -> tuple[CorpusCoverage, ...] | None:
        """The newest coverage, after a moment's wait for one being read; None before the first."""
        if self._cache is not None and self._reading is None and time.monotonic() >= self._next:
            self._reading = asyncio.create_task(self._read(self._cache), name="coverage")
        if self._reading is not None:
            # A wait that is over leaves the reading alone, for the next caller.
            await asyncio.wait({self._reading}, timeout=_PATIENCE_SECONDS)
        return self._found

    async def _read(self, cache: Cache) -> None:
        begin = time.monotonic()
        try:
            self._found, self.error = await asyncio.to_thread(read_coverage, cache), ""
        except PotstillError as error:
            self.error = error.detail
        finally:
            seconds = time.monotonic() - begin
            self._next = begin + max(_PAUSE_SECONDS, seconds * _PAUSE_PER_SECOND)
            self._reading = None


def _of_corpus(cache: Cache, name: str) -> CorpusCoverage:
    corpus = cache.corpus(name)
    return CorpusCoverage(
        corpus=name,
        rows=len(corpus),
        positions=corpus.num_positions,
        shards=corpus.num_shards,
        teachers=tuple(_of_teacher(cache, teacher, name) for teacher in cache.teachers(name)),
    )


def _of_teacher(cache: Cache, teacher: str, corpus: str) -> TeacherCoverage:
    # Opened afresh each time: sets of further fields may have come, or all been deleted.
    try:
        committed = cache.targets(teacher, corpus).committed
    except PotstillError as error:
        return TeacherCoverage(teacher=teacher, committed=0, cells=(), error=error.detail)
    return TeacherCoverage(teacher=teacher, committed=int(committed.sum()), cells=fold(committed))
