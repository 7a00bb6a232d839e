"""Texts of callers are searched in time linear in their length, whatever is in them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from potstill.cache.corpus.row_values import _WHOLE
from potstill.cache.errors import InvalidInput
from potstill.cache.lineage import path_and_steps
from potstill.cache.logins import without_login
from potstill.cache.store.claims import _NAME
from potstill.cache.store.object_stores import explain
from potstill.cache.upkeep.delete import _FOLDED, _GROUP, _SEGMENT
from potstill.teacher_service.access.audit import _text
from potstill.teacher_service.telemetry.logs import choose_request_id

LENGTH = 1_000_000
SECONDS = 2.0  # of this process's CPU time; what is quadratic takes hours


@contextmanager
def bounded_time() -> Iterator[None]:
    def over(*_: object) -> None:
        pytest.fail(f"over {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def all_of_a_record(text: str) -> None:
    for pattern in (_SEGMENT, _FOLDED, _GROUP):
        pattern.search(text.encode())


@pytest.mark.parametrize(
    ("search", "units"),
    [
        (without_login, ["/", "//", "a:", "=a:", "(", "=a:b@", "//a:b@", "@", ":", "a:b@@", "é"]),
        (InvalidInput, ["/", "=a:"]),
        (_text, ["?key", "?", "&key", "?token=", "://", "://a@", "bearer ", "potstill_", "basic", "key=", "?k&e"]),
        (choose_request_id, ["a", "a."]),
        (lambda text: explain(OSError(text)), ["<Code>", "40", "<Code>a</Code", "\n"]),
        (lambda text: path_and_steps(text, None), ["import of u8 within 1", "1", "journal of "]),
        (_WHOLE.fullmatch, ["1", "+"]),
        (_NAME.fullmatch, ["-0001", "-"]),
        (all_of_a_record, ['"segment": ', '"group":"', '"shards": 1', " "]),
    ],
)
def test_a_megabyte_is_searched_in_linear_time(search: Callable[[str], object], units: list[str]) -> None:
    for unit in units:
        text = unit * (LENGTH // len(unit))
        with bounded_time():
            search(text)
