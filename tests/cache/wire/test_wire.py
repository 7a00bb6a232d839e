from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from potstill.cache import Draws, Fields, Targets
from potstill.cache.wire import scores as wire
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.scored_rows import ARRAYS, arrow_answer, assert_same

ROW = hnp.arrays(np.uint32, st.integers(0, 12), elements=st.integers(0, 2**32 - 1))
FIELDS = st.builds(
    Fields,
    k=st.integers(0, 5000),
    draws=st.integers(1, 100),
    seed=st.integers(0, 2**63 - 1),
    entropy=st.booleans(),
    temperatures=st.lists(st.floats(0.01, 100.0), max_size=3).map(tuple),
    dense=st.booleans(),
) | st.builds(Fields, k=st.integers(1, 5000))


def floats(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    # -inf and NaN mean something on the wire, so they are drawn often.
    numbers = st.sampled_from([-np.inf, np.nan, 0.0]) | st.floats(-100.0, 0.0, width=32)
    return hnp.arrays(np.float32, shape, elements=numbers)


@st.composite
def some_draws(draw: st.DrawFn, num_positions: int) -> Draws:
    lengths = draw(st.lists(st.integers(0, 4), min_size=num_positions, max_size=num_positions))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids, counts = (draw(hnp.arrays(kind, int(offsets[-1]))) for kind in (np.uint32, np.uint16))
    return Draws(offsets, ids, counts)


@st.composite
def answers(draw: st.DrawFn) -> wire.ScoreAnswer:
    k = draw(st.integers(0, 5))
    entropy, has_draws = draw(st.booleans()), draw(st.booleans())
    widths = {"log_z": draw(st.sampled_from([None, 1, 3])), "dense": draw(st.sampled_from([None, 7]))}

    def one(num_positions: int) -> Targets:
        wide = {name: None if w is None else draw(floats((num_positions, w))) for name, w in widths.items()}
        return Targets(
            ids=draw(hnp.arrays(np.uint32, (num_positions, k))),
            logprobs=draw(floats((num_positions, k))),
            log_tail=draw(floats((num_positions,))),
            label_logprob=draw(floats((num_positions,))),
            entropy=draw(floats((num_positions,))) if entropy else None,
            draws=draw(some_draws(num_positions)) if has_draws else None,
            **wide,
        )

    lengths = draw(st.lists(st.integers(0, 5), max_size=4))
    identity = fake_identity(model=draw(st.text(max_size=10)))
    return wire.ScoreAnswer(identity, [one(length) for length in lengths])


@given(rows=st.lists(ROW, max_size=5), fields=FIELDS)
def test_a_request_survives_arrow(rows: list[np.ndarray], fields: Fields) -> None:
    got = wire.request_from_arrow(wire.request_to_arrow(wire.ScoreRequest(rows, fields)))
    assert got.fields == fields
    assert [row.dtype for row in got.rows] == [np.dtype(np.uint32)] * len(rows)
    assert [row.tolist() for row in got.rows] == [row.tolist() for row in rows]


@given(rows=st.lists(ROW, max_size=5), fields=FIELDS)
def test_a_request_survives_json(rows: list[np.ndarray], fields: Fields) -> None:
    text = json.dumps({"rows": [row.tolist() for row in rows], "fields": fields.to_json()})
    got = wire.request_from_json(json.loads(text))
    assert got.fields == fields
    assert [row.tolist() for row in got.rows] == [row.tolist() for row in rows]


@given(answer=answers())
def test_an_answer_survives_arrow_bit_by_bit(answer: wire.ScoreAnswer) -> None:
    got = wire.answer_from_arrow(wire.answer_to_arrow(answer, Fields(k=3)))
    assert got.identity.to_json() == answer.identity.to_json()
    assert len(got.targets) == len(answer.targets)
    for left, right in zip(got.targets, answer.targets, strict=True):
        assert_same(left, right)


@given(answer=answers())
def test_a_json_answer_is_strict_json_with_null_for_no_number(answer: wire.ScoreAnswer) -> None:
    text = json.dumps(wire.answer_to_json(answer), allow_nan=False)
    for row, targets in zip(json.loads(text)["rows"], answer.targets, strict=True):
        assert row["ids"] == targets.ids.tolist()
        assert ("draw_ids" in row) == ("draw_counts" in row) == (targets.draws is not None)
        for position in range(targets.num_positions if targets.draws is not None else 0):
            assert targets.draws is not None
            there = targets.draws[position : position + 1]
            assert row["draw_ids"][position] == there.ids.tolist()
            assert row["draw_counts"][position] == there.counts.tolist()
        for name in ARRAYS[1:]:
            array = getattr(targets, name)
            assert (name in row) == (array is not None)
            if array is not None:
                read = np.array(row[name], dtype=np.float32).reshape(array.shape)
                np.testing.assert_array_equal(read, np.where(np.isfinite(array), array, np.nan))


TOP_3 = Fields(k=3)
NO_TOP_K = Fields(k=0, draws=5, entropy=True, temperatures=(2.0,), dense=True)


def column_names(body: bytes) -> list[str]:
    with pa.ipc.open_stream(body) as reader:
        names: list[str] = reader.schema.names
    return names


def test_columns_that_were_not_asked_for_are_not_sent() -> None:
    always = ["log_tail", "label_logprob"]
    assert column_names(arrow_answer(TOP_3)) == ["ids", "logprobs", *always]
    assert column_names(arrow_answer(Fields(k=0, draws=2))) == [*always, "draw_ids", "draw_counts"]
    assert column_names(arrow_answer(NO_TOP_K)) == [*always, "entropy", "log_z", "dense", "draw_ids", "draw_counts"]


def test_a_range_without_a_top_k_survives_arrow() -> None:
    targets = FakeTeacher().targets(np.arange(5, dtype=np.uint32), NO_TOP_K)
    answer = wire.ScoreAnswer(fake_identity(), [targets])
    (got,) = wire.answer_from_arrow(wire.answer_to_arrow(answer, NO_TOP_K)).targets
    assert_same(got, targets)
    assert got.k == 0
