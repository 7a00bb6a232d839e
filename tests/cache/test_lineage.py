"""What the figures of a commit compare with, as the steps of its provenance say it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from potstill.cache.encoding.logprobs import ENCODINGS, Encoding
from potstill.cache.errors import FormatError
from potstill.cache.lineage import IMPORT, JOURNAL, ONLY_BOUNDED, Handed, Step, measured_against
from potstill.cache.types import JSON, Provenance

U8, F32 = ENCODINGS["u8"], ENCODINGS["f32"]
BY_JOURNAL = (Step(how=JOURNAL),)


def provenance(capture_path: str, *steps: Step) -> Provenance:
    return Provenance(engine="e", engine_version="1", device="cpu", capture_path=capture_path, steps=steps)


def of_before(path: str) -> Provenance:
    """As a record has it that was written when steps were words of the capture path."""
    return Provenance.from_json({"engine": "e", "engine_version": "1", "device": "cpu", "capture_path": path})


def kept(how: str, name: str, bound: float, *, partly: bool = False) -> Step:
    return Step(how=how, encoding=name, max_abs_error=bound, partly=partly)


@pytest.mark.parametrize(
    ("path", "steps", "words", "within"),
    [
        ("sampler", [], "the teacher", 0.0),
        ("sampler, journal", [Step(how=JOURNAL)], "the teacher", 0.0),
        ("", [], "the teacher", 0.0),
        ("import of everything within reach", [], "the teacher", 0.0),
        ("sampler, import of f32 within 0.0", [kept(IMPORT, "f32", 0.0)], "the teacher", 0.0),
        ("import", [Step.imported(None)], "what was imported, of unknown error", None),
        (
            "sampler, import, import of u8 within 0.0635",
            [Step.imported(None), kept(IMPORT, "u8", 0.0635)],
            "what was imported, of unknown error",
            None,
        ),
        (
            "sampler, import of u8 within 0.0635",
            [kept(IMPORT, "u8", 0.0635)],
            "what was imported: u8, within 0.0635 of the teacher",
            0.0635,
        ),
        (
            "a, import of f16 within 0.016, import of f32 within 0.0",
            [kept(IMPORT, "f16", 0.016), kept(IMPORT, "f32", 0.0)],
            "what was imported: f16, within 0.016 of the",
            0.016,
        ),
        (
            "a, journal of u8 within 0.0635",
            [kept(JOURNAL, "u8", 0.0635)],
            "what the journal kept: u8, within 0.0635 of the teacher",
            0.0635,
        ),
        (
            "a, journal partly of u8 within 0.0635",
            [kept(JOURNAL, "u8", 0.0635, partly=True)],
            "the teacher, and for some rows what the journal kept: u8",
            0.0635,
        ),
        (
            "a, journal of u8 within 0.0635, import of f16 within 0.016",
            [kept(JOURNAL, "u8", 0.0635), kept(IMPORT, "f16", 0.016)],
            "what was imported: u8, then f16, within",
            0.0795,
        ),
    ],
)
def test_the_steps_say_what_was_handed_to_the_encoder_also_those_in_a_record_of_before(
    path: str, steps: list[Step], words: str, within: float | None
) -> None:
    read = of_before(path)
    assert list(read.steps) == steps
    assert read.whole_path == path
    assert Provenance.from_json(read.to_json()) == read
    handed = Handed.after(read.steps)
    assert handed.words.startswith(words)
    assert handed.max_abs_error == (None if within is None else pytest.approx(within))


@pytest.mark.parametrize("known", ENCODINGS.values(), ids=lambda encoding: encoding.name)
def test_every_encoding_comes_back_from_the_step_that_names_it(known: Encoding) -> None:
    for step in (
        Step.imported(known.to_json()),
        *(kept(JOURNAL, known.name, known.max_abs_error, partly=partly) for partly in (False, True)),
    ):
        assert Handed.after([step]).max_abs_error == known.max_abs_error
        made = provenance("sampler", step)
        assert Provenance.from_json(made.to_json()) == of_before(made.whole_path) == made


def test_a_provenance_without_steps_is_kept_as_it_always_was() -> None:
    assert set(provenance("sampler").to_json()) == {
        "engine", "engine_version", "device", "capture_path", "captured_at"
    }  # fmt: skip


@pytest.mark.parametrize(
    "told",
    [{}, {"name": "u8"}, {"name": "u8", "max_abs_error": None}, {"name": "a, b", "max_abs_error": 0.1},
     {"name": "u8", "max_abs_error": -1.0}, {"name": "u8", "max_abs_error": float("inf")}],
)  # fmt: skip
def test_a_file_that_does_not_say_its_bound_is_of_unknown_error(told: dict[str, JSON]) -> None:
    assert provenance("sampler", Step.imported(told)).whole_path == "sampler, import"
    assert provenance("", Step.imported(told)).whole_path == "import"


@pytest.mark.parametrize(
    "steps",
    [0, "journal", {"how": "journal"}, ["journal"], [{}], [{**asdict(BY_JOURNAL[0]), "max_abs_error": "0"}],
     [{**asdict(BY_JOURNAL[0]), "max_abs_error": -1.0}], [{**asdict(BY_JOURNAL[0]), "how": 1}]],
)  # fmt: skip
def test_steps_that_cannot_be_read_are_refused(steps: Any) -> None:
    with pytest.raises(FormatError, match="provenance"):
        Provenance.from_json({**provenance("sampler").to_json(), "steps": steps})


def test_a_newer_writers_keys_of_a_step_are_ignored() -> None:
    made = provenance("sampler", *BY_JOURNAL)
    told = {**made.to_json(), "steps": [{**asdict(BY_JOURNAL[0]), "since": 3}]}
    assert Provenance.from_json(told) == made


def test_figures_that_an_earlier_compact_added_bounds_to_count_as_not_measured() -> None:
    added = {"max_abs": 0.1041, "mean_kl": 7.2e-4, "p999_kl": 0.0637}
    measured = {"max_abs": 0.0446, "mean_kl": 9.4e-5, "p999_kl": 2e-4}
    assert measured_against(BY_JOURNAL, added, U8.max_abs_error) == ONLY_BOUNDED
    assert measured_against(BY_JOURNAL, measured, U8.max_abs_error).words == "the teacher"
    by_fill = measured_against((), added, U8.max_abs_error)
    assert by_fill.words == "the teacher", "a fill measures: a high figure is a finding"
    assert measured_against(BY_JOURNAL, dict.fromkeys(added, 0.0), F32.max_abs_error).words == "the teacher"
