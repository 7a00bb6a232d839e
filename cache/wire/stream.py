"""Arrow IPC streams of many record batches, which neither end holds whole.

Arrow takes a stream that ends between two batches for complete. So each stream says at its beginning how long it will
be, and its reader refuses one that ends before. The schema metadata has:

    potstill.format     wire version
    potstill.batches    record batches to come
    potstill.length     positions, or elements of an array, in all batches
    potstill.corpus     fingerprint of the corpus
    potstill.identity   the teacher's identity; targets only
    potstill.fields     the fields of the targets; targets only

Targets have the columns of `wire.scores`, one record batch per block of positions or per row. An array has one column,
`values`. A request for rows is one record batch with the column `rows` (int64).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput
from potstill.cache.types import Fields, Targets, TeacherIdentity
from potstill.cache.wire import scores as wire
from potstill.cache.wire.messages import CheckedStream, CutShort, Source

PIECE_BYTES = 1 << 18
"""Bytes of a piece of text or of batches that is sent."""
_BATCHES, _LENGTH, _CORPUS = b"potstill.batches", b"potstill.length", b"potstill.corpus"
_VALUES, _ROWS = "values", "rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHead:
    """Head of a stream, sent before its first batch."""

    batches: int
    length: int
    """Positions, or elements of an array, in all batches."""
    corpus: str
    """Fingerprint of the corpus."""
    identity: TeacherIdentity | None = None
    fields: Fields | None = None

    def schema(self, columns: Sequence[Any]) -> Any:
        """Make the Arrow schema with these columns, and with this head as its metadata."""
        metadata = {
            wire.FORMAT_KEY: wire.WIRE_VERSION.encode(),
            _BATCHES: str(self.batches).encode(),
            _LENGTH: str(self.length).encode(),
            _CORPUS: self.corpus.encode(),
        }
        if self.identity is not None:
            metadata[wire.IDENTITY_KEY] = json.dumps(self.identity.to_json()).encode()
        if self.fields is not None:
            metadata[wire.FIELDS_KEY] = json.dumps(self.fields.to_json()).encode()
        return pa.schema(columns, metadata=metadata)

    @classmethod
    def of(cls, schema: Any) -> StreamHead:
        """Read the head from a schema's metadata.

        Raises:
            WireVersionError: it has another wire version. InvalidInput: it is not the head of a stream.
        """
        wire.check_version(schema)
        metadata = schema.metadata
        batches, length = (metadata.get(key, b"").decode(errors="replace") for key in (_BATCHES, _LENGTH))
        if not (batches.isdecimal() and length.isdecimal() and _CORPUS in metadata):
            raise InvalidInput("the schema metadata does not say how long the stream is, or of what corpus")
        of_targets = wire.IDENTITY_KEY in metadata
        return cls(
            batches=int(batches),
            length=int(length),
            corpus=metadata[_CORPUS].decode(errors="replace"),
            identity=wire.identity_in(schema) if of_targets else None,
            fields=Fields.from_json(wire.metadata_json(schema, wire.FIELDS_KEY)) if of_targets else None,
        )


def write_targets(head: StreamHead, groups: Iterable[Sequence[Targets]]) -> Iterator[bytes]:
    """Write a stream in pieces, one per group; each `Targets` of a group is one record batch.

    Errors of reading `groups` come through, and leave the stream without its end: the reader sees it cut short.
    """
    schema, batches, length = None, 0, 0
    for group in groups:
        parts = []
        if schema is None:
            schema = head.schema(wire.answer_columns(group[0]))
            parts.append(schema.serialize())
        parts += [wire.to_batch(targets, schema).serialize() for targets in group]
        batches, length = batches + len(group), length + sum(targets.num_positions for targets in group)
        yield b"".join(parts)
    assert (batches, length) == (head.batches, head.length), "a stream keeps what it promised"
    yield wire.END


def write_array(head: StreamHead, parts: Iterable[NDArray[Any]]) -> Iterator[bytes]:
    """Write an array [N] or [N, D] as a stream, in pieces of one record batch; see `write_targets`."""
    schema, batches, length = None, 0, 0
    for part in parts:
        flat = pa.array(np.ascontiguousarray(part).reshape(-1))
        column = flat if part.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, part.shape[1])
        first = b""
        if schema is None:
            schema = head.schema([pa.field(_VALUES, column.type)])
            first = schema.serialize()
        batches, length = batches + 1, length + len(part)
        yield b"".join([first, pa.record_batch([column], schema=schema).serialize()])
    assert (batches, length) == (head.batches, head.length), "a stream keeps what it promised"
    yield wire.END


def write_row_numbers(rows: Sequence[int], fields: Fields | None = None) -> bytes:
    """Write a request for rows of a corpus, or with `fields` for their targets."""
    metadata = {wire.FORMAT_KEY: wire.WIRE_VERSION.encode()}
    if fields is not None:
        metadata[wire.FIELDS_KEY] = json.dumps(fields.to_json()).encode()
    schema = pa.schema([pa.field(_ROWS, pa.int64())], metadata=metadata)
    return wire.one_batch(pa.record_batch([pa.array(np.asarray(rows, np.int64))], schema=schema))


def read_row_numbers(body: bytes, *, max_rows: int | None = None) -> tuple[list[int], Fields | None]:
    """Read what `write_row_numbers` wrote.

    Raises:
        WireVersionError: it has another wire version. InvalidInput: it is something else.
        LimitExceeded: there are more than `max_rows` rows, or batches.
    """
    try:
        schema, batches = wire.open_stream(body, max_rows=max_rows)
        fields = (
            Fields.from_json(wire.metadata_json(schema, wire.FIELDS_KEY))
            if wire.FIELDS_KEY in schema.metadata
            else None
        )
        columns = [wire.only_column(batch, _ROWS, pa.int64()) for batch in batches]
    except pa.ArrowException as error:
        raise InvalidInput(f"the body is not an Arrow stream of row numbers: {error}") from error
    if any(column.null_count for column in columns):
        raise InvalidInput("column 'rows' has nulls; every row has a number")
    return [row for column in columns for row in column.to_numpy().tolist()], fields


def in_pieces(parts: Iterable[Any], size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Cut and join parts of bytes or buffers to pieces of `size` bytes each; the last may be shorter."""
    held: list[memoryview] = []
    left = size
    for part in parts:
        view = memoryview(part)
        while view:
            held.append(view[:left])
            view, left = view[left:], left - len(held[-1])
            if not left:
                yield b"".join(held)
                held, left = [], size
    if held:
        yield b"".join(held)


class StreamReader:
    """Reads a stream while it arrives: iterate over `targets()`, or over the parts of its `array()`.

    Raises, also while iterating:
        CutShort: the body ended or broke before the stream did.
        WireVersionError: it has another wire version. InvalidInput: it is not such a stream.
    """

    def __init__(self, source: Source) -> None:
        self._stream = CheckedStream(source)
        self.head = StreamHead.of(self._stream.schema)

    def targets(self) -> Iterator[Targets]:
        """Read one `Targets` per record batch; raises as the class does."""
        for batch in self._batches():
            yield wire.from_batch(batch)

    def array(self) -> Iterator[NDArray[Any]]:
        """Read the array in parts [n] or [n, D]; raises as the class does."""
        for batch in self._batches():
            if batch.schema.names != [_VALUES] or batch.column(0).null_count:
                raise InvalidInput(f"an array has one column {_VALUES!r} without nulls")
            column = batch.column(0)
            fixed = pa.types.is_fixed_size_list(column.type)
            flat = (column.flatten() if fixed else column).to_numpy(zero_copy_only=False)
            yield flat.reshape(len(column), -1) if fixed else flat

    def _batches(self) -> Iterator[Any]:
        batches = length = 0
        for batch in self._stream.batches():
            batches, length = batches + 1, length + batch.num_rows
            if batches > self.head.batches or length > self.head.length:
                raise InvalidInput(f"the stream is longer than the {self.head.length} it promised")
            yield batch
        if (batches, length) != (self.head.batches, self.head.length):
            raise CutShort(f"{length} of {self.head.length} arrived")
