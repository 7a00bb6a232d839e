"""Several readers: answers in order, bounds kept, errors where their answer would have come, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from potstill.cache.errors import CorruptSegment
from potstill.student_trainer.data.prefetch import ReadAhead
from tests.support.waiting import until


class Gate:
    """Reads that wait until they are let go, by number."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.reading: set[int] = set()
        self.open: set[int] = set()
        self.begun: list[int] = []

    def read(self, number: int) -> int:
        with self.changed:
            self.begun.append(number)
            self.reading.add(number)
            self.changed.notify_all()
            self.changed.wait_for(lambda: number in self.open)
            self.reading.discard(number)
        return number

    def let(self, *numbers: int) -> None:
        with self.changed:
            self.open.update(numbers)
            self.changed.notify_all()


def test_answers_come_in_order_however_readers_overtake() -> None:
    gate = Gate()
    with ReadAhead(gate.read, range(6), readers=3, ahead=6).until_closed() as answers:
        until(lambda: gate.reading == {0, 1, 2})
        gate.let(2, 1)
        until(lambda: gate.reading == {0, 3, 4})
        gate.let(*range(6))
        assert list(answers) == list(range(6))
        assert list(answers) == []


def test_no_more_is_read_than_may_wait() -> None:
    gate = Gate()
    gate.let(*range(20))
    with ReadAhead(gate.read, range(20), readers=4, ahead=3).until_closed() as answers:
        until(lambda: len(gate.begun) == 3)
        assert next(answers) == 0
        until(lambda: len(gate.begun) == 4)
        assert sorted(gate.begun) == [0, 1, 2, 3]


def test_bytes_bound_what_waits_but_never_the_one_that_is_wanted() -> None:
    gate = Gate()
    gate.let(*range(20))
    with ReadAhead(
        gate.read, range(20), readers=1, ahead=10, size=lambda _: 40, most_bytes=100
    ).until_closed() as answers:
        until(lambda: len(gate.begun) == 2)
        assert [next(answers) for _ in range(5)] == list(range(5))
    with ReadAhead(gate.read, range(5), readers=2, ahead=10, size=lambda _: 400, most_bytes=100).until_closed() as big:
        assert list(big) == list(range(5))


def test_an_error_comes_where_its_answer_would_have() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise CorruptSegment("segment 3 is damaged")
        return number

    with ReadAhead(read, range(9), readers=4, ahead=8).until_closed() as answers:
        assert [next(answers) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CorruptSegment, match="segment 3"):
            next(answers)
        assert list(answers) == []


def test_an_error_in_what_is_wanted_comes_in_its_place() -> None:
    def wanted() -> Iterator[int]:
        yield from range(4)
        raise CorruptSegment("row_starts is damaged")

    with ReadAhead(lambda number: number, wanted(), readers=3, ahead=8).until_closed() as answers:
        assert [next(answers) for _ in range(4)] == list(range(4))
        with pytest.raises(CorruptSegment, match="row_starts"):
            next(answers)


def test_leaving_stops_the_threads() -> None:
    before = threading.active_count()
    gate = Gate()
    gate.let(*range(1000))
    with ReadAhead(gate.read, range(1000), readers=3, ahead=2).until_closed() as answers:
        assert next(answers) == 0
    assert threading.active_count() == before


def test_a_read_that_hangs_is_left_behind_after_so_long() -> None:
    gate = Gate()
    with ReadAhead(gate.read, range(3), readers=1, ahead=2).until_closed(0.05):
        until(lambda: gate.reading == {0})
    gate.let(0, 1, 2)
