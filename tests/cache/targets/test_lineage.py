"""What the figures of a commit compare with, as its capture path says it."""

from __future__ import annotations

import pytest

from potstill.cache.encoding.logprobs import ENCODINGS, Encoding
from potstill.cache.targets.lineage import ONLY_BOUNDED, Handed, from_journal, imported, measured_against
from potstill.cache.types import JSON

U8, F32 = ENCODINGS["u8"], ENCODINGS["f32"]


@pytest.mark.parametrize(
    ("path", "words", "within"),
    [
        ("sampler", "the teacher", 0.0),
        ("sampler, journal", "the teacher", 0.0),
        ("", "the teacher", 0.0),
        ("import of everything within reach", "the teacher", 0.0),
        ("sampler, import of f32 within 0.0", "the teacher", 0.0),
        ("import", "what was imported, of unknown error", None),
        ("sampler, import, import of u8 within 0.0635", "what was imported, of unknown error", None),
        ("sampler, import of u8 within 0.0635", "what was imported: u8, within 0.0635 of the teacher", 0.0635),
        (
            "a, import of f16 within 0.016, import of f32 within 0.0",
            "what was imported: f16, within 0.016 of the",
            0.016,
        ),
        ("a, journal of u8 within 0.0635", "what the journal kept: u8, within 0.0635 of the teacher", 0.0635),
        ("a, journal partly of u8 within 0.0635", "the teacher, and for some rows what the journal kept: u8", 0.0635),
        (
            "a, journal of u8 within 0.0635, import of f16 within 0.016",
            "what was imported: u8, then f16, within",
            0.0795,
        ),
    ],
)
def test_a_capture_path_says_what_was_handed_to_the_encoder(path: str, words: str, within: float | None) -> None:
    handed = Handed.of(path)
    assert handed.words.startswith(words)
    assert handed.max_abs_error == (None if within is None else pytest.approx(within))


@pytest.mark.parametrize("known", ENCODINGS.values(), ids=lambda encoding: encoding.name)
def test_every_encoding_comes_back_from_the_path_that_names_it(known: Encoding) -> None:
    assert Handed.of(imported("sampler", known.to_json())).max_abs_error == known.max_abs_error
    for partly in (False, True):
        assert Handed.of(from_journal("sampler", known, partly=partly)).max_abs_error == known.max_abs_error


def test_rows_that_lost_nothing_came_along_bit_by_bit() -> None:
    assert (
        from_journal("sampler", None, partly=True) == from_journal("sampler", F32, partly=False) == "sampler, journal"
    )


@pytest.mark.parametrize(
    "told",
    [{}, {"name": "u8"}, {"name": "u8", "max_abs_error": None}, {"name": "a, b", "max_abs_error": 0.1},
     {"name": "u8", "max_abs_error": -1.0}, {"name": "u8", "max_abs_error": float("inf")}],
)  # fmt: skip
def test_a_file_that_does_not_say_its_bound_is_of_unknown_error(told: dict[str, JSON]) -> None:
    assert imported("sampler", told) == "sampler, import"
    assert imported("", told) == "import"


def test_figures_that_an_earlier_compact_added_bounds_to_count_as_not_measured() -> None:
    added = {"max_abs": 0.1041, "mean_kl": 7.2e-4, "p999_kl": 0.0637}
    measured = {"max_abs": 0.0446, "mean_kl": 9.4e-5, "p999_kl": 2e-4}
    assert measured_against("sampler, journal", added, U8) == ONLY_BOUNDED
    assert measured_against("sampler, journal", measured, U8).words == "the teacher"
    assert measured_against("sampler", added, U8).words == "the teacher", "a fill measures: a high figure is a finding"
    assert measured_against("sampler, journal", dict.fromkeys(added, 0.0), F32).words == "the teacher"
