from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from potstill.cache import Fields, TeacherIdentity
from potstill.cache.errors import FormatError, InvalidInput, PotstillError, SpecMismatch, UnsupportedField, error_class
from potstill.cache.types import Draws, Targets
from tests.support.fakes import FakeTeacher, fake_identity

ROW = np.array([3, 1, 4, 1, 5], dtype=np.uint32)
EVERYTHING = Fields(k=8, draws=6, entropy=True, temperatures=(0.5, 2.0), dense=True)


def subclasses(root: type[PotstillError]) -> list[type[PotstillError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in subclasses(child))]


def test_every_error_has_a_kind_of_its_own_and_is_found_by_it() -> None:
    kinds = [cls.kind for cls in subclasses(PotstillError)]
    assert len(set(kinds)) == len(kinds)
    assert all(error_class(cls.kind) is cls for cls in subclasses(PotstillError))
    assert error_class("of the future") is PotstillError


def test_an_error_is_told_on_one_line() -> None:
    assert InvalidInput("two\n  lines").detail == "two lines"


def test_identity_survives_json_and_names_what_differs() -> None:
    identity = fake_identity()
    assert TeacherIdentity.from_json(identity.to_json()).to_json() == identity.to_json()
    other = fake_identity(model="other")
    assert identity.differences(other) == f"weights_sha256: {identity.weights_sha256!r} != {other.weights_sha256!r}"
    assert identity != other
    assert identity.differences(identity) == ""
    assert identity != identity.to_json()


def test_a_models_name_is_a_label_where_the_weights_are_known() -> None:
    identity = fake_identity()
    renamed = replace(identity, model="of another folder")
    assert identity == renamed
    assert identity.differences(renamed) == ""
    assert replace(renamed, dtype="bfloat16").differences(identity) == "dtype: 'bfloat16' != 'float32'"


@pytest.mark.parametrize("unknown", ["unknown", "", "F" * 64, "f" * 63, "f" * 64 + "\n"])
def test_a_models_name_stands_in_for_weights_that_nobody_knows(unknown: str) -> None:
    named = replace(fake_identity(), weights_sha256=unknown)
    assert named == replace(named)
    assert named != replace(named, model="other")
    assert "model: 'fake' != 'other'" in named.differences(replace(named, model="other"))
    known = fake_identity()
    assert named != known
    assert known != named
    assert "weights_sha256: " in known.differences(named)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"model": "x"},
        {**fake_identity().to_json(), "vocab_size": -1},
        {**fake_identity().to_json(), "weights_sha256": None},
    ],
)
def test_a_broken_identity_is_refused(broken: object) -> None:
    with pytest.raises(FormatError):
        TeacherIdentity.from_json(broken)


@pytest.mark.parametrize(
    "value",
    [
        {"k": 0},
        {"k": -1},
        {"k": 0, "seed": 3},
        {"k": True},
        {"k": 1.5},
        {"draws": -1},
        {"temperatures": [0.0]},
        {"temperatures": [10**400]},
        {"temperatures": "1"},
        {"top": 3},
        [],
    ],
)
def test_bad_fields_are_refused_in_one_line(value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        Fields.from_json(value)
    assert "fields" in caught.value.detail


def test_fields_survive_json() -> None:
    fields = Fields(k=8, draws=50, seed=3, entropy=True, temperatures=(0.5, 2.0))
    assert Fields.from_json(fields.to_json()) == fields


def test_fields_equal_their_round_trip_whatever_their_temperatures_came_in() -> None:
    fields = Fields(temperatures=[0.5, 2.0])  # type: ignore[arg-type]
    assert fields == Fields.from_json(fields.to_json())
    assert hash(fields) == hash(Fields(temperatures=(0.5, 2.0)))


def test_targets_and_draws_print_as_one_short_line() -> None:
    targets = FakeTeacher().targets(ROW, EVERYTHING)
    assert repr(targets) == "Targets(positions=5, k=8, fields=draws,entropy,log_z,dense)"
    assert repr(targets.only(Fields(k=8))) == "Targets(positions=5, k=8)"
    assert targets.draws is not None
    assert repr(targets.draws) == f"Draws(positions=5, ids={len(targets.draws.ids)})"


def test_a_k_prefix_moves_the_dropped_mass_into_the_tail() -> None:
    teacher = FakeTeacher()
    wide, narrow = teacher.distribution(ROW, 16), teacher.distribution(ROW, 4)
    cut = wide.prefix(4)
    assert np.array_equal(cut.ids, narrow.ids)
    np.testing.assert_allclose(cut.log_tail, narrow.log_tail, atol=1e-5)
    with pytest.raises(UnsupportedField, match="only k=16 is kept"):
        wide.prefix(17)


def test_a_prefix_of_nothing_leaves_the_other_fields() -> None:
    whole = FakeTeacher().targets(ROW, EVERYTHING)
    rest = whole.prefix(0)
    assert (rest.k, rest.num_positions) == (0, len(ROW))
    assert (rest.log_tail == 0).all()
    assert np.isnan(rest.label_logprob).all()
    assert rest.draws is whole.draws
    assert rest.dense is whole.dense


def test_slices_joined_again_are_the_whole() -> None:
    whole = FakeTeacher().targets(ROW, EVERYTHING)
    joined = Targets.concat([whole[0:2], whole[2:2], whole[2:5]])
    for name in ("ids", "logprobs", "log_tail", "label_logprob", "entropy", "log_z", "dense"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name), err_msg=name)
    assert joined.draws is not None
    assert whole.draws is not None
    for name in ("offsets", "ids", "counts"):
        np.testing.assert_array_equal(getattr(joined.draws, name), getattr(whole.draws, name), err_msg=name)


def test_a_range_of_draws_begins_at_zero_and_stays_inside() -> None:
    draws = Draws(np.array([0, 2, 3, 5]), np.array([1, 4, 2, 0, 7], np.uint32), np.array([1, 2, 3, 2, 1], np.uint16))
    middle = draws[1:3]
    assert middle.offsets.tolist() == [0, 1, 3]
    assert middle.ids.tolist() == [2, 0, 7]
    assert middle.counts.tolist() == [3, 2, 1]
    for empty in (draws[3:], draws[2:1], draws[9:12]):
        assert (empty.offsets.tolist(), empty.ids.tolist()) == ([0], [])


@pytest.mark.parametrize(
    ("asked", "held", "left"),
    [
        (Fields(k=8), Fields(k=8), None),
        (Fields(k=8, draws=5, seed=2), Fields(k=8), Fields(k=0, draws=5, seed=2)),
        (Fields(k=8, draws=5, seed=2), Fields(k=0, draws=5, seed=2), Fields(k=8)),
        (Fields(k=0, entropy=True), Fields(k=8, entropy=True), None),
        (Fields(k=8, dense=True, temperatures=(2.0,)), Fields(k=0, dense=True), Fields(k=8, temperatures=(2.0,))),
        # A command line has 2.0 of what a JSON request or a TOML file has as 2.
        (Fields(k=8, temperatures=(2,)), Fields(k=8, temperatures=(2.0,)), None),
    ],
)
def test_what_is_held_already_is_not_asked_for_again(asked: Fields, held: Fields, left: Fields | None) -> None:
    assert asked.without(held) == left
    if left is not None:
        assert held.joined(left).without(asked) is None


@pytest.mark.parametrize(
    ("asked", "held", "name"),
    [
        (Fields(k=8), Fields(k=9), "k"),
        (Fields(k=0, draws=5), Fields(k=0, draws=6), "draws"),
        (Fields(k=0, draws=5, seed=1), Fields(k=0, draws=5, seed=2), "draws"),
        (Fields(temperatures=(2.0,)), Fields(temperatures=(4.0,)), "temperatures"),
    ],
)
def test_another_k_seed_or_temperature_than_the_one_held_is_refused(asked: Fields, held: Fields, name: str) -> None:
    with pytest.raises(SpecMismatch, match=name):
        asked.without(held)
