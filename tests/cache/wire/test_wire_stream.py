from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest

from potstill.cache import Fields, Targets
from potstill.cache.errors import InvalidInput, WireVersionError
from potstill.cache.wire.messages import CutShort
from potstill.cache.wire.scores import END
from potstill.cache.wire.stream import (
    StreamHead,
    StreamReader,
    in_pieces,
    read_row_numbers,
    write_array,
    write_row_numbers,
    write_targets,
)
from tests.support.fakes import FakeTeacher, fake_identity

FULL = Fields(k=4, draws=5, seed=1, entropy=True, temperatures=(2.0,), dense=True)
TEACHER = FakeTeacher()


def targets(positions: int, fields: Fields = FULL) -> Targets:
    return TEACHER.targets(np.arange(positions, dtype=np.uint32), fields)


def head(batches: int, length: int, fields: Fields | None = FULL) -> StreamHead:
    identity = None if fields is None else fake_identity()
    return StreamHead(batches=batches, length=length, corpus="f" * 64, identity=identity, fields=fields)


def read(body: bytes) -> list[Targets]:
    return list(StreamReader(io.BytesIO(body)).targets())


def test_targets_come_back_bit_by_bit_one_batch_each() -> None:
    parts = [targets(3), targets(1), targets(5)]
    pieces = list(write_targets(head(3, 9), [parts[:2], parts[2:]]))
    assert len(pieces) == 3
    reader = StreamReader(io.BytesIO(b"".join(pieces)))
    assert reader.head == head(3, 9)
    for one, other in zip(reader.targets(), parts, strict=True):
        for name in ("ids", "logprobs", "log_tail", "label_logprob", "entropy", "log_z", "dense"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
        assert one.draws is not None
        assert other.draws is not None
        np.testing.assert_array_equal(one.draws.ids, other.draws.ids)


def test_a_stream_cut_at_any_byte_is_never_taken_for_a_whole_one() -> None:
    body = b"".join(write_targets(head(3, 9, Fields(k=2)), [[targets(n, Fields(k=2))] for n in (3, 1, 5)]))
    whole = len(read(body))
    for cut in range(len(body) - len(END)):
        with pytest.raises(CutShort):
            read(body[:cut])
    # Only Arrow's own end is missing then: all that was promised is there.
    for cut in range(len(body) - len(END), len(body)):
        with suppress(CutShort):
            assert len(read(body[:cut])) == whole


@pytest.mark.parametrize(("batches", "length"), [(1, 3), (3, 9), (2, 5), (2, 3)])
def test_a_stream_that_is_not_as_long_as_it_says_is_refused(batches: int, length: int) -> None:
    schema_of = list(write_targets(head(2, 4), [[targets(3)], [targets(1)]]))
    with pa.ipc.open_stream(b"".join(schema_of)) as reader:
        read_batches = list(reader)
        schema = reader.schema.with_metadata(
            {**reader.schema.metadata, b"potstill.batches": b"%d" % batches, b"potstill.length": b"%d" % length}
        )
    body = b"".join([schema.serialize(), *(batch.serialize() for batch in read_batches), END])
    with pytest.raises((CutShort, InvalidInput)):
        read(body)


def test_what_is_no_stream_of_ours_is_refused() -> None:
    body = b"".join(write_targets(head(1, 3), [[targets(3)]]))
    schema = pa.schema([pa.field("values", pa.uint32())])
    other = b"".join([schema.serialize(), END])
    with pytest.raises(WireVersionError, match="'none'.*'1'"):
        read(other)
    newer = schema.with_metadata({b"potstill.format": b"2"}).serialize().to_pybytes()
    with pytest.raises(WireVersionError, match="'2'.*'1'"):
        read(newer + END)
    unpromised = schema.with_metadata({b"potstill.format": b"1"}).serialize().to_pybytes()
    with pytest.raises(InvalidInput, match="how long"):
        read(unpromised + END)
    for nonsense in (b"", b"<html>no</html>" * 100):
        with pytest.raises((CutShort, InvalidInput)):
            read(nonsense)
    with pytest.raises(InvalidInput, match="schema"):
        read(_without_schema(body))


def _without_schema(body: bytes) -> bytes:
    messages = list(pa.ipc.MessageReader.open_stream(body))
    return b"".join([messages[1].serialize().to_pybytes(), END])


def test_compressed_batches_are_refused_before_they_are_unpacked() -> None:
    schema = head(1, 1 << 20, None).schema([pa.field("values", pa.uint32())])
    batch = pa.record_batch([pa.array(np.zeros(1 << 20, np.uint32))], schema=schema)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    with pytest.raises(InvalidInput, match="compressed"):
        list(StreamReader(io.BytesIO(sink.getvalue())).array())


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint32", "int64", "float32", "float64"])
def test_arrays_keep_their_dtype_and_width(dtype: str) -> None:
    flat = (np.arange(10) % 3).astype(dtype)
    wide = np.arange(32, dtype=np.uint8).reshape(2, 16)
    for array in (flat, wide):
        parts = [array[:1], array[1:]]
        body = b"".join(write_array(head(2, len(array), None), parts))
        found = np.concatenate(list(StreamReader(io.BytesIO(body)).array()))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_pieces_are_cut_and_joined_to_a_size_and_none_is_lost() -> None:
    pieces = [b"a" * 3, b"b" * 4, b"c" * 9, b"d"]
    assert list(in_pieces(pieces, 6)) == [b"aaabbb", b"bccccc", b"ccccd"]
    assert list(in_pieces([], 6)) == []


def test_row_numbers_come_back_with_the_fields() -> None:
    assert read_row_numbers(write_row_numbers([3, 0, 3], FULL)) == ([3, 0, 3], FULL)
    assert read_row_numbers(write_row_numbers([1])) == ([1], None)
    for body in (b"", b"nonsense", write_row_numbers([1])[:-20]):
        with pytest.raises(InvalidInput):
            read_row_numbers(body)
