from __future__ import annotations

import numpy as np
import pytest

from cache import Fields, TeacherIdentity
from cache.errors import FormatError, InvalidInput, PotstillError, UnsupportedField, error_class
from cache.types import Targets
from tests.fakes import FakeTeacher, fake_identity

ROW = np.array([3, 1, 4, 1, 5], dtype=np.uint32)


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
    assert TeacherIdentity.from_json(identity.to_json()) == identity
    assert "model: 'fake' != 'other'" in identity.differences(fake_identity(model="other"))
    assert identity.differences(identity) == ""


@pytest.mark.parametrize("broken", [[], {}, {"model": "x"}, {**fake_identity().to_json(), "vocab_size": -1}])
def test_a_broken_identity_is_refused(broken: object) -> None:
    with pytest.raises(FormatError):
        TeacherIdentity.from_json(broken)


@pytest.mark.parametrize(
    "value",
    [{"k": 0}, {"k": True}, {"k": 1.5}, {"draws": -1}, {"temperatures": [0.0]}, {"temperatures": "1"}, {"top": 3}, []],
)
def test_bad_fields_are_refused_in_one_line(value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        Fields.from_json(value)
    assert "fields" in caught.value.detail


def test_fields_survive_json() -> None:
    fields = Fields(k=8, draws=50, seed=3, entropy=True, temperatures=(0.5, 2.0))
    assert Fields.from_json(fields.to_json()) == fields
    with pytest.raises(UnsupportedField, match="draws, entropy, temperatures"):
        fields.require_only_top_k("this")


def test_a_k_prefix_moves_the_dropped_mass_into_the_tail() -> None:
    teacher = FakeTeacher()
    wide, narrow = teacher.distribution(ROW, 16), teacher.distribution(ROW, 4)
    cut = wide.prefix(4)
    assert np.array_equal(cut.ids, narrow.ids)
    np.testing.assert_allclose(cut.log_tail, narrow.log_tail, atol=1e-5)
    with pytest.raises(UnsupportedField, match="only k=16 is kept"):
        wide.prefix(17)


def test_slices_joined_again_are_the_whole() -> None:
    whole = FakeTeacher().distribution(ROW, 8)
    joined = Targets.concat([whole[0:2], whole[2:5]])
    assert np.array_equal(joined.ids, whole.ids)
    assert np.array_equal(joined.label_logprob, whole.label_logprob, equal_nan=True)
