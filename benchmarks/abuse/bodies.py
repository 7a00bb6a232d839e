"""Bodies that become far more than their bytes: Arrow that unpacks, and rows by the million."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow as pa

from benchmarks.abuse.attack import CORPUS, TEACHER, Attack, Door, trusting
from potstill.cache.wire.scores import ARROW_MEDIA_TYPE, JSON_MEDIA_TYPE
from tests.cache.wire.old_codec import old_codec_stream

UNPACKED_BYTES = 200 * 2**20
UNPACKED_TIMES = 16
BODY_BYTES = 8_300_000
"""Just under the default `max_body_bytes`."""
AT_ONCE = 6

_SCORE = f"/v1/teachers/{TEACHER}/score"
_ROWS = f"/v1/corpora/{CORPUS}/targets/{TEACHER}/rows"
_KIND = pa.list_(pa.uint32())


def older_compression(door: Door) -> None:
    """Send 100 kB that the older message metadata says are compressed, and that unpack to 3.1 GiB."""
    items = UNPACKED_BYTES // 4
    column = pa.ListArray.from_arrays(pa.array([0, items], pa.int32()), pa.array(np.zeros(items, np.uint32)))
    batch = pa.record_batch([column], schema=_schema("row", _KIND))
    post(door, _SCORE, old_codec_stream(batch, "zstd", batches=UNPACKED_TIMES), ARROW_MEDIA_TYPE, 1)


def empty_rows_as_arrow(door: Door) -> None:
    """Send millions of empty rows in each of some bodies."""
    column = pa.ListArray.from_arrays(pa.array(np.zeros(BODY_BYTES // 4, np.int32)), pa.array([], pa.uint32()))
    post(door, _SCORE, _stream(pa.record_batch([column], schema=_schema("row", _KIND))), ARROW_MEDIA_TYPE)


def empty_batches(door: Door) -> None:
    """Send a record batch of one empty row, tens of thousands of times."""
    batch = pa.record_batch([pa.array([[]], _KIND)], schema=_schema("row", _KIND))
    message = batch.serialize().to_pybytes()
    post(door, _SCORE, batch.schema.serialize().to_pybytes() + message * (BODY_BYTES // len(message)), ARROW_MEDIA_TYPE)


def empty_rows_as_json(door: Door) -> None:
    """Send the same as JSON, and objects instead of rows."""
    post(door, _SCORE, b'{"rows":[' + b"[]," * (BODY_BYTES // 3) + b"[1]]}", JSON_MEDIA_TYPE)
    post(door, _SCORE, b'{"rows":[' + b"{}," * (BODY_BYTES // 3) + b"[1]]}", JSON_MEDIA_TYPE)
    post(door, "/v1/completions", b'{"prompt":[' + b"[]," * (BODY_BYTES // 3) + b"[1]]}", JSON_MEDIA_TYPE)


def row_numbers(door: Door) -> None:
    """Ask for the targets of millions of rows."""
    numbers = pa.record_batch([pa.array(np.full(BODY_BYTES // 8, 1 << 40))], schema=_schema("rows", pa.int64()))
    post(door, _ROWS, _stream(numbers), ARROW_MEDIA_TYPE)
    post(door, _ROWS, b'{"rows":[' + b"9999," * (BODY_BYTES // 5) + b"1]}", JSON_MEDIA_TYPE)


def objects_of_a_small_route(door: Door) -> None:
    """Send millions of empty objects to a route that wants a few keys, and is an admin's."""
    body = b'{"model":[' + b"{}," * (BODY_BYTES // 3) + b"1]}"
    post(door, f"/v1/teachers/{TEACHER}", body, JSON_MEDIA_TYPE, method="PUT")


def post(door: Door, path: str, body: bytes, kind: str, times: int = AT_ONCE, *, method: str = "POST") -> Sequence[int]:
    """Send a body some times at once; returns the statuses of those that were answered."""

    def send(_: int) -> int:
        headers = {**door.trainer, "content-type": kind}
        with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=60, verify=trusting()) as client:
            return client.request(method, door.url + path, content=body, headers=headers).status_code
        return 0

    with ThreadPoolExecutor(times) as pool:
        statuses = list(pool.map(send, range(times)))
    assert 200 not in statuses, "nothing of this may be served"
    return statuses


def _schema(name: str, kind: pa.DataType) -> pa.Schema:
    return pa.schema([(name, kind)], metadata={b"potstill.format": b"1", b"potstill.fields": b'{"k": 2}'})


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body: bytes = sink.getvalue().to_pybytes()
    return body


ATTACKS = (
    Attack(2, "100 kB that unpack to 3 GiB", older_compression),
    Attack(8, "millions of empty rows as Arrow", empty_rows_as_arrow),
    Attack(8, "tens of thousands of batches of nothing", empty_batches),
    Attack(8, "millions of empty rows as JSON", empty_rows_as_json),
    Attack(8, "millions of row numbers", row_numbers),
    Attack(8, "millions of objects for an admin's route", objects_of_a_small_route),
)
