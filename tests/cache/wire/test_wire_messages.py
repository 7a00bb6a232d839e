"""Arrow messages by the allow-list: what our writers do not write is refused before pyarrow makes anything of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest

from potstill.cache.errors import InvalidInput, PotstillError
from potstill.cache.wire import StreamReader, scores as wire
from potstill.cache.wire.messages import CheckedStream, CutShort
from tests.cache.wire.old_codec import OLD_CODEC, old_codec_stream

V4, V5 = pa.ipc.MetadataVersion.V4, pa.ipc.MetadataVersion.V5
REQUEST = {b"potstill.format": b"1", b"potstill.fields": b'{"k": 2}'}
STREAM = {
    b"potstill.format": b"1",
    b"potstill.batches": b"1",
    b"potstill.length": b"%d" % (1 << 22),
    b"potstill.corpus": b"",
}
ZEROS = pa.array(np.zeros(1 << 22, np.uint32))


def zero_row() -> pa.RecordBatch:
    column = pa.ListArray.from_arrays(pa.array([0, len(ZEROS)], pa.int32()), ZEROS)
    return pa.record_batch([column], schema=pa.schema([pa.field("row", column.type)], metadata=REQUEST))


def zero_array() -> pa.RecordBatch:
    return pa.record_batch(
        [ZEROS], schema=pa.schema([("values", pa.uint32())], metadata={**STREAM, b"potstill.corpus": b""})
    )


def read_request(body: bytes) -> None:
    wire.request_from_arrow(body)


def read_stream(body: bytes) -> None:
    list(StreamReader(io.BytesIO(body)).array())


@pytest.mark.parametrize(("batch", "read"), [(zero_row, read_request), (zero_array, read_stream)])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize(("version", "words"), [(V4, "V4"), (V5, "uncompressed")])
def test_a_codec_in_the_older_spelling_unpacks_nothing(
    batch: Callable[[], pa.RecordBatch], read: Callable[[bytes], None], codec: str, version: object, words: str
) -> None:
    body = old_codec_stream(batch(), codec, version=version)
    before = pa.total_allocated_bytes()
    with pytest.raises(InvalidInput, match=words):
        read(body)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize(
    "kind",
    [
        pa.null(),
        pa.string(),
        pa.binary(4),
        pa.string_view(),
        pa.struct([("a", pa.int32())]),
        pa.dense_union([pa.field("a", pa.int32())]),
        pa.run_end_encoded(pa.int32(), pa.int32()),
        pa.list_view(pa.int32()),
        pa.large_list(pa.int32()),
        pa.list_(pa.list_(pa.int32())),
        pa.list_(pa.null()),
        pa.list_(pa.int32(), 0),
        pa.dictionary(pa.int32(), pa.int32()),
        pa.list_(pa.dictionary(pa.int32(), pa.int32())),
        pa.json_(),
    ],
    ids=str,
)
def test_a_column_of_a_type_that_is_never_written_is_refused_at_the_schema(kind: pa.DataType) -> None:
    with pytest.raises(InvalidInput, match="column|entries"):
        CheckedStream(pa.schema([("row", pa.list_(pa.uint32())), ("more", kind)]).serialize().to_pybytes())


def test_schemas_with_more_than_ours_have_are_refused() -> None:
    many = pa.schema([(f"c{index}", pa.int32()) for index in range(33)])
    keys = pa.schema([("a", pa.int32())], metadata={b"k%d" % index: b"" for index in range(17)})
    long = pa.schema([("a", pa.int32())], metadata={b"k": b" " * 2**20})
    for schema, words in ((many, "33 entries"), (keys, "17 entries"), (long, "messages")):
        with pytest.raises(InvalidInput, match=words):
            CheckedStream(schema.serialize().to_pybytes())


def test_metadata_of_a_batch_is_refused_whatever_it_says() -> None:
    batch, sink = zero_array().slice(0, 2), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata={OLD_CODEC[:-1]: b""})
    with pytest.raises(InvalidInput, match="metadata of its own"):
        list(CheckedStream(sink.getvalue().to_pybytes()).batches())


@pytest.mark.parametrize("length", [-1, 2**62, 2**40])
def test_lengths_that_the_body_cannot_have_are_refused_before_it_is_read(length: int) -> None:
    # Places of the metadata where the number of items stands, and that of their bytes with what fills them up.
    batch = zero_array().slice(0, 1001)
    schema, message = batch.schema.serialize().to_pybytes(), batch.serialize().to_pybytes()
    head = len(message) - 4008
    for number in (1001, 4008):
        at = message.index(number.to_bytes(8, "little"))
        assert at < head
        changed = message[:at] + length.to_bytes(8, "little", signed=True) + message[at + 8 : head]
        source = io.BytesIO(schema + changed)
        with pytest.raises((InvalidInput, CutShort)):
            list(CheckedStream(source).batches())


def test_a_body_is_read_where_it_lies() -> None:
    batch = zero_row()
    body = batch.schema.serialize().to_pybytes() + batch.serialize().to_pybytes()
    before = pa.total_allocated_bytes()
    (row,) = wire.request_from_arrow(body).rows
    assert np.shares_memory(row, np.frombuffer(body, np.uint8))
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_no_cut_of_a_stream_raises_anything_else() -> None:
    batch = zero_array().slice(0, 3)
    body = batch.schema.serialize().to_pybytes() + batch.serialize().to_pybytes()
    for cut in range(len(body)):
        with suppress(CutShort, PotstillError):
            assert not list(CheckedStream(io.BytesIO(body[:cut])).batches())
