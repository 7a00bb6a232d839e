"""Requests and answers of scoring: Arrow IPC streams, and JSON for people and curl.

A request is one record batch with the column `row` (list of uint32). An answer has one record batch per row. Both
carry the wire version in their schema metadata, so that a client and a service of different versions refuse each other
in one clear line instead of misreading. Record batches are not compressed, as a small one could unpack to any size;
`wire.messages` says what is read at all.

    column                          Arrow type                      there when
    ids, logprobs                   fixed-size lists of K           k > 0
    log_tail, label_logprob         float32                         always
    entropy                         float32                         asked for
    log_z, dense                    fixed-size lists of float32     asked for
    draw_ids, draw_counts           lists of uint32, uint16         asked for

JSON has the same names, every column a list of positions. It has no infinities: `null` stands for -inf in `logprobs`,
`log_tail` and `dense`, and for "no label" in `label_logprob`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from potstill.cache.errors import FormatError, InvalidInput, LimitExceeded, WireVersionError
from potstill.cache.fields import COLUMNS, FIELDS
from potstill.cache.types import JSON, Draws, Fields, Targets, TeacherIdentity, Tokens
from potstill.cache.wire.messages import CheckedStream, CutShort

ARROW_MEDIA_TYPE = "application/vnd.apache.arrow.stream"
JSON_MEDIA_TYPE = "application/json"
WIRE_VERSION = "1"
FORMAT_HEADER = "potstill-format"
"""HTTP header with the wire version, for requests and answers whose body does not have it."""

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""End-of-stream marker of Arrow IPC."""

FORMAT_KEY = b"potstill.format"
FIELDS_KEY = b"potstill.fields"
IDENTITY_KEY = b"potstill.identity"

_FLOAT_COLUMNS = [each.name for each in FIELDS if each.shape is not None]
_DRAW_COLUMNS = {"draw_ids": pa.list_(pa.uint32()), "draw_counts": pa.list_(pa.uint16())}


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A client's request: rows of token ids, each [T] uint32, and the fields that it wants of them."""

    rows: list[Tokens]
    fields: Fields


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """A service's answer: the teacher's identity, and one `Targets` per row, in order."""

    identity: TeacherIdentity
    targets: list[Targets]


def request_to_arrow(request: ScoreRequest) -> bytes:
    """Write a request as an Arrow IPC stream."""
    metadata = {FORMAT_KEY: WIRE_VERSION.encode(), FIELDS_KEY: json.dumps(request.fields.to_json()).encode()}
    schema = pa.schema([pa.field("row", pa.list_(pa.uint32()))], metadata=metadata)
    lengths = np.cumsum([0, *map(len, request.rows)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, np.uint32), *request.rows]).astype(np.uint32, copy=False)
    column = pa.ListArray.from_arrays(pa.array(lengths), pa.array(flat))
    return one_batch(pa.record_batch([column], schema=schema))


def one_batch(batch: Any) -> bytes:
    """Write a stream of one record batch."""
    return b"".join([batch.schema.serialize(), batch.serialize(), END])


def request_from_arrow(body: bytes, *, max_rows: int | None = None) -> ScoreRequest:
    """Read a request stream.

    Raises:
        WireVersionError: it has another wire version. InvalidInput: it is not such an Arrow stream.
        LimitExceeded: there are more than `max_rows` rows, or batches.
    """
    schema, batches = open_stream(body, max_rows=max_rows)
    fields = Fields.from_json(metadata_json(schema, FIELDS_KEY))
    rows: list[Tokens] = []
    for batch in batches:
        column = only_column(batch, "row", pa.list_(pa.uint32()))
        if column.null_count or column.values.null_count:
            raise InvalidInput("column 'row' has nulls; every row is a list of token ids")
        values = column.values.to_numpy()
        offsets = column.offsets.to_numpy()
        rows.extend(values[a:b] for a, b in pairwise(offsets))
    return ScoreRequest(rows, fields)


def answer_to_arrow(answer: ScoreAnswer, fields: Fields) -> bytes:
    """Write an answer as an Arrow IPC stream, one record batch per row; `fields` gives K when there is no row."""
    return b"".join(answer_parts(answer, fields))


def answer_parts(answer: ScoreAnswer, fields: Fields) -> Iterator[Any]:
    """Write the same in parts that lie one after the other: bytes, and buffers that are the targets' own memory."""
    metadata = {FORMAT_KEY: WIRE_VERSION.encode(), IDENTITY_KEY: json.dumps(answer.identity.to_json()).encode()}
    columns = answer_columns(answer.targets[0]) if answer.targets else _top_k_columns(fields.k)
    schema = pa.schema(columns, metadata=metadata)
    sink = _Parts()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        for targets in answer.targets:
            writer.write_batch(to_batch(targets, schema))
            yield from sink.taken()
    yield from sink.taken()


def answer_from_arrow(body: bytes) -> ScoreAnswer:
    """Read an answer stream.

    Raises:
        WireVersionError: it has another wire version. InvalidInput: it is not such an Arrow stream.
    """
    schema, batches = open_stream(body)
    return ScoreAnswer(identity_in(schema), [from_batch(batch) for batch in batches])


def request_from_json(value: Any) -> ScoreRequest:
    """Read `{"rows": [[id, ...]], "fields": {"k": 64}}`.

    Raises:
        InvalidInput: the value has another shape, or an id is not a whole number in [0, 2**32).
    """
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise InvalidInput('the body must be a JSON object like {"rows": [[1, 2]], "fields": {"k": 64}}')
    unknown = sorted(set(value) - {"rows", "fields"})
    if unknown:
        raise InvalidInput(f"the body has the unknown key {unknown[0]!r}; known are rows, fields")
    rows = [_row_from_json(index, row) for index, row in enumerate(value["rows"])]
    return ScoreRequest(rows, Fields.from_json(value.get("fields", {})))


def answer_to_json(answer: ScoreAnswer) -> dict[str, JSON]:
    """Convert to `{"identity": {...}, "rows": [{"ids", "logprobs", "log_tail", "label_logprob", ...}]}`."""
    return {"identity": answer.identity.to_json(), "rows": [targets_to_json(t) for t in answer.targets]}


def targets_to_json(targets: Targets) -> dict[str, JSON]:
    """Convert one row's targets to lists; see the module docstring for `null`."""
    row: dict[str, JSON] = {"ids": targets.ids.tolist()}
    for name in ("logprobs", "log_tail", "label_logprob", *_FLOAT_COLUMNS):
        array = getattr(targets, name)
        if array is not None:
            values = array.astype(object)
            values[~np.isfinite(array)] = None
            row[name] = values.tolist()
    if targets.draws is not None:
        bounds = list(pairwise(targets.draws.offsets.tolist()))
        row["draw_ids"] = [targets.draws.ids[a:b].tolist() for a, b in bounds]
        row["draw_counts"] = [targets.draws.counts[a:b].tolist() for a, b in bounds]
    return row


def _row_from_json(index: int, row: Any) -> Tokens:
    if not isinstance(row, list):
        raise InvalidInput(f"rows[{index}] must be a list of token ids")
    for token in row:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**32:
            raise InvalidInput(f"rows[{index}] has {token!r}; a token id is a whole number in [0, 2**32)")
    return np.array(row, dtype=np.uint32)


def _top_k_columns(k: int) -> list[Any]:
    lists = [pa.field("ids", pa.list_(pa.uint32(), k)), pa.field("logprobs", pa.list_(pa.float32(), k))]
    return [*(lists if k else []), pa.field("log_tail", pa.float32()), pa.field("label_logprob", pa.float32())]


def answer_columns(targets: Targets) -> list[Any]:
    """Arrow fields of the columns in which targets like these are sent."""
    columns = _top_k_columns(targets.k)
    for name in _FLOAT_COLUMNS:
        array = getattr(targets, name)
        if array is not None:
            columns.append(pa.field(name, pa.list_(pa.float32(), array.shape[1]) if array.ndim > 1 else pa.float32()))
    if targets.draws is not None:
        columns.extend(pa.field(name, kind) for name, kind in _DRAW_COLUMNS.items())
    return columns


def to_batch(targets: Targets, schema: Any) -> Any:
    """Convert targets to one record batch; `schema` has the columns of `answer_columns`."""
    return pa.record_batch([_to_column(targets, field) for field in schema], schema=schema)


def _to_column(targets: Targets, field: Any) -> Any:
    if field.name in _DRAW_COLUMNS:
        draws = targets.draws
        assert draws is not None, "every row of an answer has the same fields"
        values = draws.ids if field.name == "draw_ids" else draws.counts
        return pa.ListArray.from_arrays(pa.array(draws.offsets.astype(np.int32)), pa.array(values))
    flat = pa.array(np.ascontiguousarray(getattr(targets, field.name)).reshape(-1))
    fixed = pa.types.is_fixed_size_list(field.type)
    return pa.FixedSizeListArray.from_arrays(flat, field.type.list_size) if fixed else flat


def from_batch(batch: Any) -> Targets:
    """Read what `to_batch` made.

    Raises:
        InvalidInput: there are other columns or types, or nulls.
    """
    names = set(batch.schema.names)
    floats = {
        name: _numpy(only_column(batch, name, pa.float32()))
        if name in COLUMNS
        else _list_column(batch, name, pa.float32())
        for name in ("log_tail", "label_logprob", *(name for name in _FLOAT_COLUMNS if name in names))
    }
    if names & {"ids", "logprobs"}:
        ids, logprobs = _list_column(batch, "ids", pa.uint32()), _list_column(batch, "logprobs", pa.float32())
    else:
        ids, logprobs = np.empty((batch.num_rows, 0), np.uint32), np.empty((batch.num_rows, 0), np.float32)
    if ids.shape != logprobs.shape:
        raise InvalidInput("columns 'ids' and 'logprobs' have different widths")
    draws = _draws(batch) if names & set(_DRAW_COLUMNS) else None
    return Targets(ids=ids, logprobs=logprobs, **floats, draws=draws)


def _draws(batch: Any) -> Draws:
    (id_offsets, ids), (count_offsets, counts) = (
        _ragged_column(batch, name, kind) for name, kind in _DRAW_COLUMNS.items()
    )
    if not np.array_equal(id_offsets, count_offsets):
        raise InvalidInput("columns 'draw_ids' and 'draw_counts' have lists of different lengths")
    return Draws(id_offsets, ids, counts)


def _ragged_column(batch: Any, name: str, kind: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Offsets [P + 1], starting at 0, and the entries of all lists one after the other."""
    column = only_column(batch, name, kind)
    if column.null_count:
        raise InvalidInput(f"column {name!r} has nulls")
    # An array of no lists may have no offsets at all.
    offsets = column.offsets.to_numpy().astype(np.int64) if len(column) else np.zeros(1, np.int64)
    return offsets - offsets[0], _numpy(column.values[int(offsets[0]) : int(offsets[-1])])


def _list_column(batch: Any, name: str, item: Any) -> NDArray[Any]:
    # A name that is there twice cannot be looked up by name, so the names are counted first.
    column = batch.column(name) if batch.schema.names.count(name) == 1 else None
    if column is None or not pa.types.is_fixed_size_list(column.type) or column.type.value_type != item:
        raise InvalidInput(f"there must be one column {name!r}, a fixed-size list of {item}")
    if column.type.list_size < 1:
        raise InvalidInput(f"column {name!r} has lists of no entries")
    if column.null_count:
        raise InvalidInput(f"column {name!r} has nulls")
    return _numpy(column.flatten()).reshape(len(column), column.type.list_size)


def only_column(batch: Any, name: str, kind: Any) -> Any:
    """Return the one column of that name.

    Raises:
        InvalidInput: there is none, there are several, or it has another type.
    """
    if batch.schema.names.count(name) != 1 or batch.column(name).type != kind:
        raise InvalidInput(f"there must be one column {name!r} of type {kind}")
    return batch.column(name)


def _numpy(column: Any) -> NDArray[Any]:
    if column.null_count:
        raise InvalidInput("a column has nulls; every position has a value")
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array


class _Parts(io.RawIOBase):
    """A file for pyarrow that keeps what is written as it is."""

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> None:
        self._parts.append(part)

    def taken(self) -> list[Any]:
        """All that was written since the last call."""
        parts, self._parts = self._parts, []
        return parts


def open_stream(body: bytes, *, max_rows: int | None = None) -> tuple[Any, list[Any]]:
    """Read a whole stream: its schema, and its record batches, checked.

    Raises:
        WireVersionError: it has another wire version. InvalidInput: it is no Arrow stream of ours, see `wire.messages`.
        LimitExceeded: there are more than `max_rows` rows, or batches.
    """
    batches: list[Any] = []
    rows = 0
    try:
        stream = CheckedStream(body)
        check_version(stream.schema)
        for batch in stream.batches():
            batches.append(batch)
            rows += batch.num_rows
            # Before anything is made of them: a row of no tokens takes 4 bytes here, and a hundred as an object.
            if max_rows is not None and max(rows, len(batches)) > max_rows:
                what = "rows" if rows > max_rows else "record batches"
                raise LimitExceeded(f"more than max_rows={max_rows} {what} are in the body; send fewer per request")
    except CutShort as error:
        raise InvalidInput(f"the body is not a whole Arrow IPC stream: {error}") from error
    return stream.schema, batches


def check_version(schema: Any) -> None:
    """Refuse a schema of another wire version.

    Raises:
        WireVersionError: the versions differ; the error names both.
    """
    require_version((schema.metadata or {}).get(FORMAT_KEY, b"none").decode(errors="replace"))


def require_version(version: str) -> None:
    """Refuse another wire version than this end's.

    Raises:
        WireVersionError: the versions differ; the error names both.
    """
    if version != WIRE_VERSION:
        raise WireVersionError(
            f"the body has wire version {version[:40]!r}, this end speaks {WIRE_VERSION!r}; "
            "install the same potstill version on both ends"
        )


def identity_in(schema: Any) -> TeacherIdentity:
    """Read the teacher's identity from the schema metadata; raises InvalidInput where there is none."""
    try:
        return TeacherIdentity.from_json(metadata_json(schema, IDENTITY_KEY))
    except FormatError as error:
        raise InvalidInput(f"schema metadata potstill.identity: {error}") from error


def metadata_json(schema: Any, key: bytes) -> Any:
    """Read the JSON value under a key of the schema metadata.

    Raises:
        InvalidInput: it is missing, or not JSON.
    """
    raw = (schema.metadata or {}).get(key)
    if raw is None:
        raise InvalidInput(f"the schema metadata has no {key.decode()!r}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the schema metadata {key.decode()!r} is not JSON: {error}") from error
