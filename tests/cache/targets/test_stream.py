from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from potstill.cache.errors import InvalidInput, NotCommitted
from potstill.cache.targets.stream import stream_rows
from potstill.cache.types import Fields, Targets
from tests.support.corpora import make_corpus, plan_targets, teacher_for


class CountingRows:
    """Rows whose target holds the row's index; row 99 cannot be read. `gate` holds every read up."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []
        self.fields: Fields | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Semaphore(0)

    def read_rows(self, rows: Sequence[int], *, fields: Fields | None = None) -> list[Targets]:
        self.reached.release()
        assert self.gate.wait(60)
        self.read.append(list(rows))
        self.fields = fields
        if 99 in rows:
            raise NotCommitted("row 99 has no targets")
        return [row_targets(row) for row in rows]


def row_targets(row: int) -> Targets:
    zeros = np.zeros(1, np.float32)
    ids = np.array([[row]], np.uint32)
    return Targets(ids=ids, logprobs=zeros[:, None], log_tail=zeros - np.inf, label_logprob=zeros)


def ids_of(batch: list[Targets]) -> list[int]:
    return [int(targets.ids[0, 0]) for targets in batch]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_batches_come_in_order_whatever_is_read_ahead(ahead: int) -> None:
    batches = [[3, 1], [], [4], [1, 5, 9]]
    fields = Fields(k=1)
    rows = CountingRows()
    assert [ids_of(batch) for batch in stream_rows(rows, batches, fields=fields, ahead=ahead)] == batches
    assert rows.fields is fields
    assert not reading_threads()


def test_no_batches_are_no_batches() -> None:
    assert list(stream_rows(CountingRows(), [])) == []


def test_the_next_batches_are_read_while_one_is_used_and_no_more() -> None:
    rows = CountingRows()
    stream = stream_rows(rows, ([row] for row in range(50)), ahead=2)
    assert ids_of(next(stream)) == [0]
    for _ in range(3):
        assert rows.reached.acquire(timeout=300)
    # Row 0 is in hand, 1 and 2 are read; nothing asks for row 3 before row 1 is taken.
    assert not rows.reached.acquire(timeout=0.05)
    assert ids_of(next(stream)) == [1]
    assert rows.reached.acquire(timeout=300)
    stream.close()
    assert len(rows.read) == 4


def test_an_error_comes_at_its_own_batch() -> None:
    stream = stream_rows(CountingRows(), [[1], [2], [99], [4]], ahead=3)
    assert ids_of(next(stream)) == [1]
    assert ids_of(next(stream)) == [2]
    with pytest.raises(NotCommitted, match="row 99"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not reading_threads()


def test_an_error_of_the_batches_comes_after_those_before_it() -> None:
    def batches() -> Iterator[list[int]]:
        yield [1]
        yield [2]
        raise InvalidInput("no more rows")

    stream = stream_rows(CountingRows(), batches(), ahead=3)
    assert [ids_of(next(stream)), ids_of(next(stream))] == [[1], [2]]
    with pytest.raises(InvalidInput, match="no more rows"):
        next(stream)


def test_closing_early_waits_for_the_read_under_way_and_starts_no_other() -> None:
    rows = CountingRows()
    stream = stream_rows(rows, [[row] for row in range(50)], ahead=4)
    next(stream)
    rows.gate.clear()
    while rows.reached.acquire(timeout=0.2):
        pass
    seen = len(rows.read)
    threading.Timer(0.1, rows.gate.set).start()
    stream.close()
    assert len(rows.read) <= seen + 1
    assert not reading_threads()


def test_a_dropped_stream_leaves_no_thread() -> None:
    stream = stream_rows(CountingRows(), [[row] for row in range(50)])
    next(stream)
    assert reading_threads()
    del stream
    gc.collect()
    assert not reading_threads()


def test_a_stream_must_read_ahead_at_least_one() -> None:
    with pytest.raises(InvalidInput, match="ahead is 0"):
        stream_rows(CountingRows(), [], ahead=0)


async def test_a_target_set_streams_what_it_reads(tmp_path: Path) -> None:
    cache, corpus = make_corpus(tmp_path / "cache")
    teacher = teacher_for(corpus)
    targets = plan_targets(cache, teacher)
    scored = Targets.concat(await teacher.score(corpus.rows(0, len(corpus)), Fields(k=16)))
    if hasattr(targets, "make_ranks"):
        targets.make_ranks(scored)
    starts = corpus.shard_starts
    for shard in range(corpus.num_shards):
        targets.write_shard(shard, scored[int(starts[shard]) : int(starts[shard + 1])], teacher.provenance)
    batches = [[5, 0], [2], list(range(len(corpus)))]
    for rows, batch in zip(batches, stream_rows(targets, batches), strict=True):
        for expected, found in zip(targets.read_rows(rows), batch, strict=True):
            assert np.array_equal(expected.ids, found.ids)
            assert np.array_equal(expected.logprobs, found.logprobs)
