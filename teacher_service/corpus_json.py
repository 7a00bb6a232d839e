"""Targets as JSON, in pieces: the text of an answer is several times its arrays, and is never held whole.

`json.dumps` keeps the interpreter's lock until it returns, so even in a thread a long list would stop every request.

Shape legend:  P positions, D values a position (K, temperatures or V).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import wire
from cache.types import Draws, Targets, TeacherIdentity
from cache.wire_stream import coalesced

_ELEMENTS = 1 << 14
"""Numbers that are encoded at once: some milliseconds."""


def json_pieces(identity: TeacherIdentity, read: Callable[[], Sequence[Targets]]) -> Iterator[bytes]:
    """`{"format", "identity", "rows"}` as `wire.answer_to_json` has it, in pieces of about a MiB.

    Raises:
        What `read` does, before the first piece.
    """
    texts = _texts(identity, read)
    return coalesced(text.encode() for text in texts)


def _texts(identity: TeacherIdentity, read: Callable[[], Sequence[Targets]]) -> Iterator[str]:
    parts = read()
    yield f'{{"format":{_text(wire.WIRE_VERSION)},"identity":{_text(identity.to_json())},"rows":['
    for index, targets in enumerate(parts):
        if index:
            yield ","
        yield from _row(targets)
    yield "]}"


def _row(targets: Targets) -> Iterator[str]:
    before = "{"
    for name in wire.targets_to_json(targets[:0]):
        yield f"{before}{_text(name)}:["
        for index, items in enumerate(_items(targets, name)):
            yield f",{items}" if index else items
        yield "]"
        before = ","
    yield "}"


def _items(targets: Targets, name: str) -> Iterator[str]:
    if name in ("draw_ids", "draw_counts"):
        assert targets.draws is not None, "a column of what is there"
        return _ragged_items(targets.draws, targets.draws.ids if name == "draw_ids" else targets.draws.counts)
    return _array_items(getattr(targets, name))


def _array_items(array: NDArray[Any]) -> Iterator[str]:
    """The items of a list of an array [P] or [P, D], without its brackets."""
    width = array.shape[1] if array.ndim == 2 else 1
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, len(array), step):
        block = array[start : start + step]
        if block.size <= _ELEMENTS:
            yield _text(_values(block))[1:-1]
        else:
            cuts = range(0, width, _ELEMENTS)
            yield f"[{','.join(_text(_values(block[0, at : at + _ELEMENTS]))[1:-1] for at in cuts)}]"


def _ragged_items(draws: Draws, values: NDArray[Any]) -> Iterator[str]:
    offsets = draws.offsets.tolist()
    step = max(1, _ELEMENTS * (len(offsets) - 1) // max(1, len(values)))
    for start in range(0, len(offsets) - 1, step):
        bounds = offsets[start : start + step + 1]
        yield _text([values[a:b].tolist() for a, b in pairwise(bounds)])[1:-1]


def _values(block: NDArray[Any]) -> list[Any]:
    finite = np.isfinite(block)
    if finite.all():
        return list(block.tolist())
    values = block.astype(object)
    values[~finite] = None  # JSON has no NaN and no infinity
    return list(values.tolist())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
