"""Targets as JSON, in pieces: the text of an answer is several times its arrays, and is never held whole.

`json.dumps` keeps the interpreter's lock until it returns, so even in a thread a long list would stop every request.

Shape legend:  P positions, D values per position (K, temperatures or V).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import JSON, Targets, TeacherIdentity
from potstill.cache.wire import scores as wire
from potstill.cache.wire.stream import in_pieces

_DRAWS = {"draw_ids": "ids", "draw_counts": "counts"}
_ELEMENTS = 1 << 14
"""Numbers that are encoded at once, which takes some milliseconds."""


def json_pieces(
    identity: TeacherIdentity, read: Callable[[], Sequence[Targets]], *, says_format: bool = True
) -> Iterator[bytes]:
    """Write `{"format", "identity", "rows"}` as `wire.answer_to_json` does, in pieces of about a MiB.

    Args:
        identity: the teacher's.
        read: reads the targets of each row.
        says_format: False leaves the format out, as in answers to score, whose requests have named it.

    Raises:
        What `read` does, before the first piece.
    """
    head = {"format": wire.WIRE_VERSION} if says_format else {}
    texts = _texts({**head, "identity": identity.to_json()}, read)
    return in_pieces(text.encode() for text in texts)


def _texts(head: Mapping[str, JSON], read: Callable[[], Sequence[Targets]]) -> Iterator[str]:
    parts = read()
    yield f'{_text(head)[:-1]},"rows":['
    # The wire format decides which columns there are; no positions are enough to ask it.
    names = list(wire.targets_to_json(parts[0][:0])) if parts else []
    for index, targets in enumerate(parts):
        yield ",{" if index else "{"
        for place, name in enumerate(names):
            yield f"{',' if place else ''}{_text(name)}:["
            for at, items in enumerate(_items(targets, name)):
                yield f",{items}" if at else items
            yield "]"
        yield "}"
    yield "]}"


def _items(targets: Targets, name: str) -> Iterator[str]:
    if name not in _DRAWS:
        return _array_items(getattr(targets, name))
    assert targets.draws is not None, "a column of what is there"
    return _ragged_items(targets.draws.offsets.tolist(), getattr(targets.draws, _DRAWS[name]))


def _array_items(array: NDArray[Any]) -> Iterator[str]:
    """The items of a list of an array [P] or [P, D], without its brackets."""
    width = array.shape[1] if array.ndim == 2 else 1
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, len(array), step):
        block = array[start : start + step]
        if block.size <= _ELEMENTS:
            yield _text(_values(block))[1:-1]
        else:
            # One position over the bound, which is a dense one: `step` is 1 here.
            cuts = range(0, width, _ELEMENTS)
            yield f"[{','.join(_text(_values(block[0, at : at + _ELEMENTS]))[1:-1] for at in cuts)}]"


def _ragged_items(offsets: Sequence[int], values: NDArray[Any]) -> Iterator[str]:
    step = max(1, _ELEMENTS * (len(offsets) - 1) // max(1, len(values)))
    for start in range(0, len(offsets) - 1, step):
        lists = [values[a:b].tolist() for a, b in pairwise(offsets[start : start + step + 1])]
        yield _text(lists)[1:-1]


def _values(block: NDArray[Any]) -> list[Any]:
    finite = np.isfinite(block) if block.dtype.kind == "f" else np.True_
    if finite.all():
        return list(block.tolist())
    values = block.astype(object)
    values[~finite] = None  # JSON has no NaN and no infinity
    return list(values.tolist())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
