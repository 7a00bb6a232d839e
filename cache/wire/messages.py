"""Messages of an Arrow IPC stream, checked by their metadata before pyarrow makes anything of them.

pyarrow believes what a message says of itself: a small one can name a codec and unpack to any size, or name the same
piece of metadata a million times. So only what our writers write is read, of both ends' readers:

- metadata version V5, little-endian, at most `_METADATA_BYTES` of metadata;
- one schema, then record batches: neither dictionaries nor compression, in no spelling of either;
- columns of numbers or booleans, and lists of those, `_COLUMNS` at most;
- buffers that lie in the message's body, and no lengths that a body of its size cannot have.

What is left is read without a copy, so it takes the memory of its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from potstill.cache.errors import InvalidInput

_METADATA_BYTES = 2**20
_BODY_BYTES = 2**31
_COLUMNS = 32
_KEYS = 16  # of the schema's own metadata
_V5, _SCHEMA, _RECORD_BATCH = 4, 1, 3  # numbers of Arrow's Message.fbs
_NUMBERS, _LIST, _FIXED_SIZE_LIST = frozenset({2, 3, 6}), 12, 16  # int, float and bool; of Arrow's Schema.fbs
_CONTINUES = b"\xff\xff\xff\xff"


class CutShort(Exception):
    """Raised when a stream ends or breaks before all that its head announced has arrived."""


class Source(Protocol):
    """The body of an HTTP answer while it arrives."""

    def read(self, size: int, /) -> bytes:
        """Read the next `size` bytes, fewer only at the end."""
        ...


class CheckedStream:
    """An Arrow IPC stream of ours: `schema`, and `batches()`. A source that is bytes is not copied.

    Raises, also while iterating:
        CutShort: the source ended within a message, or without any.
        InvalidInput: something else than our writers write.
    """

    def __init__(self, source: bytes | Source) -> None:
        self._source = _Held(source) if isinstance(source, bytes) else _Arriving(source)
        message = self._next(_SCHEMA)
        if message is None:
            raise CutShort("there is no schema")
        try:
            self.schema = pa.ipc.read_schema(message)
            _ = self.schema.names  # a name that is not UTF-8 is found when it is asked for
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidInput(f"the schema of an Arrow stream cannot be read: {error}") from error

    def batches(self) -> Iterator[Any]:
        """Read the record batches, one by one, each validated."""
        while (message := self._next(_RECORD_BATCH)) is not None:
            try:
                batch = pa.ipc.read_record_batch(message, self.schema)
                batch.validate(full=True)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InvalidInput(f"a record batch of an Arrow stream cannot be read: {error}") from error
            yield batch

    def _next(self, kind: int) -> Any:
        """The next message, as pyarrow reads it, or None at the end."""
        prefix = self._source.read(8)
        if len(prefix) < 8:
            if len(prefix):
                raise CutShort("the stream breaks off")
            return None
        size = int.from_bytes(prefix[4:], "little")
        if bytes(prefix[:4]) != _CONTINUES or size > _METADATA_BYTES:
            raise InvalidInput("there is something else than messages of an Arrow IPC stream")
        if size == 0:
            return None
        metadata = bytes(self._read(size))
        try:
            body_bytes = _check(metadata, kind)
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise InvalidInput(f"the metadata of an Arrow message cannot be read: {error}") from error
        self._read(body_bytes)
        try:
            return pa.ipc.read_message(self._source.message())
        except (pa.ArrowException, OSError, EOFError, ValueError) as error:
            raise InvalidInput(f"an Arrow message cannot be read: {error}") from error

    def _read(self, size: int) -> bytes | memoryview:
        data = self._source.read(size)
        if len(data) < size:
            raise CutShort("the stream breaks off")
        return data


class _Held:
    """A body that is here already."""

    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)
        self._begin = self._at = 0

    def read(self, size: int) -> memoryview:
        data = self._body[self._at : self._at + size]
        self._at += len(data)
        return data

    def message(self) -> memoryview:
        """All that was read since the last call, as one."""
        begin, self._begin = self._begin, self._at
        return self._body[begin : self._at]


class _Arriving:
    """A body that arrives while it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._parts: list[bytes] = []

    def read(self, size: int) -> bytes:
        self._parts.append(self._source.read(size) if size else b"")
        return self._parts[-1]

    def message(self) -> bytes:
        """All that was read since the last call, as one."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of Flatbuffers, at a place in `data`. Wrong offsets raise here; pyarrow verifies all of them later."""

    data: bytes
    at: int

    def place(self, number: int) -> int | None:
        """Place of a field, by its number; None when it is absent."""
        vtable = self.at - self._unpack("<i", self.at)
        entry = 4 + 2 * number
        offset = self._unpack("<H", vtable + entry) if entry < self._unpack("<H", vtable) else 0
        return self.at + offset if offset else None

    def number(self, number: int, kind: str) -> int:
        """A field that is a number, 0 when it is absent."""
        place = self.place(number)
        return 0 if place is None else self._unpack(kind, place)

    def table(self, number: int) -> _Table:
        """A field that is a table and has to be there."""
        place = self.place(number)
        if place is None:
            raise InvalidInput("the metadata of an Arrow message is not complete")
        return _Table(self.data, place + self._unpack("<I", place))

    def tables(self, number: int, most: int) -> list[_Table]:
        """A field that is a list of tables, empty when it is absent, of at most so many."""
        begin, count = self.vector(number)
        if count > most:
            raise InvalidInput(f"an Arrow schema has {count} entries where ours have at most {most}")
        places = (begin + 4 * index for index in range(count))
        return [_Table(self.data, place + self._unpack("<I", place)) for place in places]

    def vector(self, number: int) -> tuple[int, int]:
        """Place of the first item of a field that is a list, and how many there are."""
        place = self.place(number)
        if place is None:
            return 0, 0
        place += self._unpack("<I", place)
        return place + 4, self._unpack("<I", place)

    def _unpack(self, kind: str, place: int) -> int:
        if place < 0:
            raise ValueError("an offset before the beginning")
        return int(struct.unpack_from(kind, self.data, place)[0])


def _check(metadata: bytes, kind: int) -> int:
    """Check a message by the allow-list of this module; returns the bytes of its body."""
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    version, found, body_bytes = message.number(0, "<h"), message.number(1, "<B"), message.number(3, "<q")
    if version != _V5:
        raise InvalidInput(f"an Arrow message has metadata version V{version + 1}; write version V5")
    if found != kind:
        names = {_SCHEMA: "a schema", 2: "a dictionary", _RECORD_BATCH: "a record batch"}
        raise InvalidInput(
            f"an Arrow stream has {names.get(found, 'something else')} where {names[kind]} belongs: one schema, then "
            "plain record batches, no dictionary"
        )
    if message.place(4) is not None:
        raise InvalidInput("an Arrow message has metadata of its own; write plain, uncompressed batches without any")
    if not 0 <= body_bytes <= (_BODY_BYTES if kind == _RECORD_BATCH else 0):
        raise InvalidInput(f"an Arrow message has a body of {body_bytes} bytes; one of ours has at most {_BODY_BYTES}")
    if kind == _SCHEMA:
        _check_schema(message.table(2))
    else:
        _check_batch(message.table(2), body_bytes)
    return body_bytes


def _check_schema(schema: _Table) -> None:
    if schema.number(0, "<h") != 0:
        raise InvalidInput("an Arrow schema is big-endian; write little-endian batches")
    schema.tables(2, _KEYS)
    for column in schema.tables(1, _COLUMNS):
        kind = column.number(2, "<B")
        items = column.tables(5, 1)
        if kind in (_LIST, _FIXED_SIZE_LIST):
            plain = len(items) == 1 and _is_number(items[0]) and column.place(4) is None and column.place(6) is None
            if kind == _FIXED_SIZE_LIST and column.table(3).number(0, "<i") < 1:
                raise InvalidInput("a column of an Arrow schema has lists of no entries")
        else:
            plain = _is_number(column)
        if not plain:
            raise InvalidInput(
                "a column of an Arrow schema is neither numbers nor lists of numbers, or it is a dictionary or has "
                "metadata of its own"
            )


def _is_number(column: _Table) -> bool:
    """True for a column of plain numbers, without a dictionary (4), items (5) or metadata (6)."""
    bare = column.place(4) is None and column.place(6) is None and not column.vector(5)[1]
    return bare and column.number(2, "<B") in _NUMBERS


def _check_batch(batch: _Table, body_bytes: int) -> None:
    if batch.place(3) is not None:
        raise InvalidInput("an Arrow record batch is compressed; write uncompressed ones")
    lengths = [batch.number(0, "<q"), *_structs(batch, 1)[:, 0].tolist()]
    buffers = _structs(batch, 2)
    # An item takes at least a bit.
    if min(lengths) < 0 or max(lengths) > 8 * body_bytes:
        raise InvalidInput(f"an Arrow record batch tells of {max(lengths)} items in a body of {body_bytes} bytes")
    inside = (buffers >= 0) & (buffers <= body_bytes)
    if not inside.all() or (buffers.sum(axis=1) > body_bytes).any():
        raise InvalidInput(f"an Arrow record batch has a buffer outside its body of {body_bytes} bytes")


def _structs(batch: _Table, number: int) -> Any:
    """A field that is a list of pairs of int64, as [n, 2]."""
    begin, count = batch.vector(number)
    if not count:
        return np.empty((0, 2), np.int64)
    return np.frombuffer(batch.data, np.dtype("<i8"), 2 * count, begin).reshape(count, 2)
