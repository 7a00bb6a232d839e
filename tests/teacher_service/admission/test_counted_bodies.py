"""Bodies whose rows and values are counted before anything is made of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from potstill.cache.errors import LimitExceeded
from potstill.cache.wire.scores import request_from_arrow
from potstill.cache.wire.stream import read_row_numbers
from potstill.teacher_service.admission.limits import rows_of_tokens
from potstill.teacher_service.routes.completions.request import CompletionRequest
from potstill.teacher_service.routes.corpora.bodies import rows_from_json
from potstill.teacher_service.settings import LimitSettings

LIMITS = LimitSettings(max_rows=4, max_tokens_in_flight=8000)
MANY = 300_000
TOKENS = pa.list_(pa.uint32())


def arrow(column: pa.Array, name: str, *, times: int = 1) -> bytes:
    schema = pa.schema([(name, column.type)], metadata={b"potstill.format": b"1", b"potstill.fields": b'{"k": 2}'})
    batch = pa.record_batch([column], schema=schema)
    return bytes(schema.serialize()) + bytes(batch.serialize()) * times


def empty_rows(count: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.uint32()))


READERS: dict[str, Callable[[bytes], object]] = {
    "score": lambda body: rows_of_tokens(body, LIMITS),
    "completions": lambda body: CompletionRequest.from_body(body, LIMITS),
    "rows": lambda body: rows_from_json(body, LIMITS.max_rows),
    "arrow": lambda body: request_from_arrow(body, max_rows=LIMITS.max_rows),
    "numbers": lambda body: read_row_numbers(body, max_rows=LIMITS.max_rows),
}


@pytest.mark.parametrize(
    ("reader", "body"),
    [
        ("score", b'{"rows":[' + b"[]," * MANY + b"[1]]}"),
        ("score", b'{"rows":[' + b'{"":{}}, ' * MANY + b"1]}"),
        ("score", b'{"rows":[[' + b"777," * MANY + b"1]]}"),
        ("score", '{"rows":[[1]],"\N{GRINNING FACE}":"'.encode() + b"a" * MANY + b'"}'),
        ("completions", b'{"prompt":[' + b"[ ]," * MANY + b"[1]]}"),
        ("rows", b'{"rows":[' + b"1," * MANY + b"1]}"),
        ("arrow", arrow(empty_rows(MANY), "row")),
        ("arrow", arrow(empty_rows(1), "row", times=2000)),
        ("arrow", arrow(empty_rows(0), "row", times=2000)),
        ("numbers", arrow(pa.array(np.arange(MANY)), "rows")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-bytes",
)
def test_more_than_the_limits_allow_is_refused_before_objects_are_made(reader: str, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="max_rows=4|max_tokens_in_flight=8000"):
            READERS[reader](body)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_what_the_limits_allow_is_read_however_it_is_written() -> None:
    rows = [list(range(1_000_000_000, 1_000_002_000))] * 4
    indented = '{\n  "rows": [\n' + ",\n".join(
        "    [\n" + ",\n".join(f"      {token}" for token in row) + "\n    ]" for row in rows
    )
    assert rows_of_tokens((indented + "\n  ]\n}").encode(), LIMITS) == {"rows": rows}
    assert len(request_from_arrow(arrow(pa.array(rows, TOKENS), "row"), max_rows=4).rows) == 4
