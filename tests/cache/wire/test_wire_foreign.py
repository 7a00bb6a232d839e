"""Bodies that are broken, of another version or shape, or written by another client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from potstill.cache import Fields
from potstill.cache.errors import InvalidInput, PotstillError, WireVersionError
from potstill.cache.wire import scores as wire
from tests.support.fakes import fake_identity
from tests.support.scored_rows import arrow_answer

TOP_3 = Fields(k=3)
NO_TOP_K = Fields(k=0, draws=5, entropy=True, temperatures=(2.0,), dense=True)


def some_request() -> bytes:
    rows = [np.arange(9, dtype=np.uint32), np.empty(0, np.uint32), np.arange(3, dtype=np.uint32)]
    return wire.request_to_arrow(wire.ScoreRequest(rows, Fields(k=3)))


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    body = bytearray(original)
    for _ in range(draw(st.integers(1, 6))):
        action = draw(st.sampled_from(["set", "flip", "cut", "insert", "double", "word"]))
        at = draw(st.integers(0, max(0, len(body) - 1)))
        if action == "set" and body:
            body[at] = draw(st.integers(0, 255))
        elif action == "flip" and body:
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del body[at : at + draw(st.integers(1, 64))]
        elif action == "insert":
            body[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "double":
            body[at:at] = body[at : at + draw(st.integers(1, 64))]
        else:  # a length or an offset of the format
            body[at : at + 4] = draw(st.sampled_from([2**31 - 1, -1, -(2**31), 0, 2**20])).to_bytes(
                4, "little", signed=True
            )
    return bytes(body)


@settings(max_examples=300)
@given(body=mutated(some_request()))
def test_a_broken_request_raises_nothing_but_our_errors(body: bytes) -> None:
    try:
        request = wire.request_from_arrow(body)
    except PotstillError:
        return
    assert all(row.dtype == np.uint32 for row in request.rows)


@settings(max_examples=600)
@given(body=mutated(arrow_answer(TOP_3)) | mutated(arrow_answer(NO_TOP_K)))
def test_a_broken_answer_raises_nothing_but_our_errors(body: bytes) -> None:
    try:
        answer = wire.answer_from_arrow(body)
    except PotstillError:
        return
    for targets in answer.targets:
        assert targets.ids.dtype == np.uint32
        assert targets.draws is None or len(targets.draws.offsets) == targets.num_positions + 1


@given(body=st.binary(max_size=200))
def test_noise_is_invalid_input(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        wire.request_from_arrow(body)


def stream(schema: pa.Schema, *columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        if columns:
            writer.write_batch(pa.record_batch(list(columns), schema=schema))
    body: bytes = sink.getvalue().to_pybytes()
    return body


META = {b"potstill.format": b"1", b"potstill.fields": b'{"k": 2}'}
ROWS = pa.array([[1, 2], [3]], type=pa.list_(pa.uint32()))


def row_schema(kind: pa.DataType = ROWS.type, *, metadata: Mapping[bytes, bytes] = MappingProxyType(META)) -> pa.Schema:
    return pa.schema([pa.field("row", kind)], metadata=dict(metadata))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (stream(row_schema(metadata={}), ROWS), "none"),
        (stream(row_schema(metadata={**META, b"potstill.format": b"2"}), ROWS), "'2'.*'1'"),
        (stream(row_schema(metadata={**META, b"potstill.format": b"\xff" * 500}), ROWS), "'1'"),
    ],
)
def test_another_wire_version_is_refused_naming_both(body: bytes, words: str) -> None:
    with pytest.raises(WireVersionError, match=words) as caught:
        wire.request_from_arrow(body)
    assert len(caught.value.detail) < 300


INT_ROWS = pa.array([[1]], type=pa.list_(pa.int64()))
NULL_ROW = pa.array([[1], None], type=pa.list_(pa.uint32()))
NULL_ID = pa.array([[1, None]], type=pa.list_(pa.uint32()))
TWICE = pa.schema([row_schema().field(0)] * 2, metadata=META)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (stream(row_schema(pa.list_(pa.int64())), INT_ROWS), "column 'row'"),
        (stream(row_schema(), NULL_ROW), "nulls"),
        (stream(row_schema(), NULL_ID), "nulls"),
        (stream(pa.schema([pa.field("rows", ROWS.type)], metadata=META), ROWS), "column 'row'"),
        (stream(TWICE, ROWS, ROWS), "'row'"),
        (stream(row_schema(metadata={b"potstill.format": b"1"}), ROWS), "potstill.fields"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b"{"}), ROWS), "JSON"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b"[" * 100_000}), ROWS), "JSON"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b"\xff\xfe\xfd"}), ROWS), "JSON"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b"[]"}), ROWS), "object"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b'{"k": 0}'}), ROWS), "k is 0"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b'{"k": -1}'}), ROWS), "fields.k"),
        (stream(row_schema(metadata={**META, b"potstill.fields": b'{"top": 1}'}), ROWS), "'top'"),
        (stream(row_schema(), ROWS)[:-40], "Arrow"),
        (b"", "Arrow"),
    ],
)
def test_a_request_of_another_shape_is_invalid_input(body: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        wire.request_from_arrow(body)


def test_rows_of_a_sliced_batch_and_of_several_batches_are_read_in_order() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row_schema()) as writer:
        batch = pa.record_batch([pa.array([[9], [1, 2], [3]], type=ROWS.type)], schema=row_schema())
        writer.write_batch(batch.slice(1))
        writer.write_batch(batch.slice(0, 1))
    rows = wire.request_from_arrow(sink.getvalue().to_pybytes()).rows
    assert [row.tolist() for row in rows] == [[1, 2], [3], [9]]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_small_body_that_unpacks_to_a_huge_one_is_refused_before_it_is_unpacked(codec: str) -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 4_000_000], pa.int32()), pa.array(np.zeros(4_000_000, np.uint32)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row_schema(), options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(pa.record_batch([column], schema=row_schema()))
    del column
    before = pa.total_allocated_bytes()
    with pytest.raises(InvalidInput, match="uncompressed"):
        wire.request_from_arrow(sink.getvalue().to_pybytes())
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_dictionaries_are_refused() -> None:
    kind = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([row_schema().field(0), pa.field("extra", kind)], metadata=META)
    body = stream(schema, ROWS, pa.array(["a", "b"], pa.string()).dictionary_encode())
    with pytest.raises(InvalidInput, match="dictionary"):
        wire.request_from_arrow(body)


def answer_stream(columns: dict[str, pa.Array], identity: bytes | None = None) -> bytes:
    value = json.dumps(fake_identity().to_json()).encode() if identity is None else identity
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    metadata = {b"potstill.format": b"1", b"potstill.identity": value}
    return stream(pa.schema(fields, metadata=metadata), *columns.values())


def fixed(values: Sequence[Sequence[float]], kind: pa.DataType, width: int) -> pa.Array:
    return pa.array(values, type=pa.list_(kind, width))


GOOD = {
    "ids": fixed([[1, 2]], pa.uint32(), 2),
    "logprobs": fixed([[-0.5, -1.5]], pa.float32(), 2),
    "log_tail": pa.array([-2.0], pa.float32()),
    "label_logprob": pa.array([float("nan")], pa.float32()),
}


DRAW_IDS = pa.array([[5, 9]], pa.list_(pa.uint32()))
DRAW_COUNTS = pa.array([[1, 4]], pa.list_(pa.uint16()))


def test_columns_in_any_order_and_draws_of_a_sliced_batch_are_read() -> None:
    several = {
        "draw_counts": pa.array([[7], [1, 4], [], [5]], pa.list_(pa.uint16())),
        "draw_ids": pa.array([[0], [5, 9], [], [2]], pa.list_(pa.uint32())),
        "label_logprob": pa.array([-1.0] * 4, pa.float32()),
        "log_tail": pa.array([0.0] * 4, pa.float32()),
    }
    identity = json.dumps(fake_identity().to_json()).encode()
    schema = pa.schema(
        [(name, column.type) for name, column in several.items()],
        metadata={b"potstill.format": b"1", b"potstill.identity": identity},
    )
    batch = pa.record_batch(list(several.values()), schema=schema).slice(1)
    (got,) = wire.answer_from_arrow(stream(schema, *batch.columns)).targets
    assert got.draws is not None
    assert (got.num_positions, got.k) == (3, 0)
    assert got.draws.offsets.tolist() == [0, 2, 2, 3]
    assert got.draws.ids.tolist() == [5, 9, 2]
    assert got.draws.counts.tolist() == [1, 4, 5]


@pytest.mark.parametrize(
    "columns",
    [
        {**GOOD, "draw_ids": DRAW_IDS},
        {**GOOD, "draw_counts": DRAW_COUNTS},
        {**GOOD, "draw_ids": DRAW_IDS, "draw_counts": DRAW_IDS},
        {**GOOD, "draw_ids": DRAW_IDS, "draw_counts": pa.array([[1]], DRAW_COUNTS.type)},
        {**GOOD, "draw_ids": DRAW_IDS, "draw_counts": pa.array([None], DRAW_COUNTS.type)},
        {**GOOD, "draw_ids": pa.array([[1, None]], DRAW_IDS.type), "draw_counts": DRAW_COUNTS},
        {**GOOD, "draw_ids": fixed([[1, 2]], pa.uint32(), 2), "draw_counts": DRAW_COUNTS},
        {name: column for name, column in GOOD.items() if name != "log_tail"},
        {name: column for name, column in GOOD.items() if name != "ids"},
        {**GOOD, "logprobs": fixed([[-0.5]], pa.float32(), 1)},
        {**GOOD, "logprobs": fixed([[-0.5, -1.5]], pa.float64(), 2)},
        {**GOOD, "ids": pa.array([[1, 2]], pa.list_(pa.uint32()))},
        {**GOOD, "ids": pa.array([None], pa.list_(pa.uint32(), 2))},
        {**GOOD, "ids": pa.array([[1, None]], pa.list_(pa.uint32(), 2))},
        {**GOOD, "log_tail": pa.array([None], pa.float32())},
        {**GOOD, "entropy": pa.array([[1.0]], pa.list_(pa.float32(), 1))},
        {**GOOD, "log_z": pa.array([1.0], pa.float32())},
        {**GOOD, "ids": fixed([[]], pa.uint32(), 0), "logprobs": fixed([[]], pa.float32(), 0)},
    ],
)
def test_an_answer_of_another_shape_is_invalid_input(columns: dict[str, pa.Array]) -> None:
    with pytest.raises(InvalidInput):
        wire.answer_from_arrow(answer_stream(columns))


@pytest.mark.parametrize("identity", [b"{}", b"[]", b"null", b'{"model": 1, "adapters": 5}', b"\xff"])
def test_an_answer_with_a_bad_identity_is_invalid_input(identity: bytes) -> None:
    with pytest.raises(InvalidInput):
        wire.answer_from_arrow(answer_stream(GOOD, identity))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"rows": None},
        {"rows": {}},
        {"rows": "ab"},
        {"rows": ["ab"]},
        {"rows": [[-1]]},
        {"rows": [[2**32]]},
        {"rows": [[1.0]]},
        {"rows": [[True]]},
        {"rows": [[None]]},
        {"rows": [[10**400]]},
        {"rows": [[1]], "k": 4},
        {"rows": [[1]], "fields": None},
        {"rows": [[1]], "fields": {"k": "4"}},
        {"rows": [[1]], "fields": {"temperatures": 1.0}},
        {"rows": [[1]], "fields": {"temperatures": [float("nan")]}},
    ],
)
def test_a_json_request_of_another_shape_is_invalid_input(value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.request_from_json(value)
    assert len(caught.value.detail) < 600
