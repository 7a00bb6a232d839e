"""Several readers: answers in order, bounds kept, errors where their answer would have come, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

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

    def read(self, numbers: Sequence[int]) -> Iterator[int]:
        return map(self._read, numbers)

    def _read(self, number: int) -> int:
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


def test_several_are_read_together_as_far_as_they_may_wait_and_are_small() -> None:
    calls: list[list[int]] = []

    def read(numbers: Sequence[int]) -> Iterator[int]:
        calls.append(list(numbers))
        return iter(numbers)

    def in_calls(size: int) -> list[list[int]]:
        calls.clear()
        with ReadAhead(read, range(8), readers=1, ahead=4, together=3, size=lambda _: size).until_closed() as answers:
            assert list(answers) == list(range(8))
        return list(calls)

    assert in_calls(1) == [[0], [1, 2, 3], [4, 5, 6], [7]]  # how large they are is known after the first
    assert in_calls(12 << 20) == [[each] for each in range(8)]


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


@pytest.mark.parametrize("together", [1, 5])
def test_an_error_comes_where_its_answer_would_have(together: int) -> None:
    def read(numbers: Sequence[int]) -> Iterator[int]:
        for number in numbers:
            if number == 3:
                raise CorruptSegment("segment 3 is damaged")
            yield number

    stream = ReadAhead(read, range(9), readers=4, ahead=8, together=together, size=lambda _: 1)
    with stream.until_closed() as answers:
        assert [next(answers) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CorruptSegment, match="segment 3"):
            next(answers)
        assert list(answers) == []


def test_an_error_in_what_is_wanted_comes_in_its_place() -> None:
    def wanted() -> Iterator[int]:
        yield from range(4)
        raise CorruptSegment("row_starts is damaged")

    stream = ReadAhead(iter, wanted(), readers=3, ahead=8, together=3, size=lambda _: 1)
    with stream.until_closed() as answers:
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
