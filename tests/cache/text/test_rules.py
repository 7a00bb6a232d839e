"""A filter's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.text.measures import MEASURES
from potstill.cache.text.rules import PRESETS, Bounds, FilterPlan


def test_presets_name_measures() -> None:
    for bounds in PRESETS.values():
        assert set(bounds) <= set(MEASURES)
    assert PRESETS["gopher"]["duplicate_5_grams"] == Bounds(most=0.15)
    assert PRESETS["gopher"]["duplicate_10_grams"] == Bounds(most=0.10)


def test_a_file_changes_rules_of_its_preset_and_options_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        'preset = "gopher"\nlanguages = ["en", "un"]\n\n[rules]\nwords = {least = 5}\nstop_words = {}\n'
        "punctuated_lines = {least = 0.1, most = 1}\n"
    )
    plan = FilterPlan.read(str(file))
    assert plan.bounds["words"] == Bounds(least=5)
    assert "stop_words" not in plan.bounds
    assert plan.bounds["punctuated_lines"] == Bounds(0.1, 1)
    assert plan.bounds["symbols"] == Bounds(most=0.1)
    assert (plan.languages, plan.duplicates) == (("en", "un"), "near")
    over = FilterPlan.read(str(file), ["de"], "exact")
    assert (over.languages, over.duplicates, over.bounds) == (("de",), "exact", plan.bounds)
    assert FilterPlan.of(over.to_json() | {"preset": "gopher"}).languages == ("de",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = 'c4'", r"preset of .*rules.toml is 'c4'; there are default, gopher, fineweb"),
        ("rule = 1", r"has the key 'rule'; there are preset, languages, duplicates and the table rules"),
        ("rules = 3", r"rules of .* is 3; make it a table"),
        ("[rules]\nwrods = {least = 1}", r"a rule of .* is 'wrods'; there are words, mean_word_length"),
        ("[rules]\nwords = 3", r"rule 'words' of .* is 3; write {least = NUMBER}"),
        ("[rules]\nwords = {min = 3}", r"rule 'words' of .* write {least = NUMBER}"),
        ("[rules]\nwords = {least = true}", r"write {least = NUMBER}"),
        ("[rules]\nwords = {least = 3, most = 2}", r"least 3 over most 2, so nothing is left"),
        ("languages = 'en'", r"languages of .* is 'en'; give codes like \['en', 'de'\]"),
        ("languages = []", r"give codes"),
        ("languages = ['English']", r"give codes"),
        ("duplicates = 'all'", r"duplicates of .* is 'all'; there are near, exact, keep"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        FilterPlan.read(str(tmp_path / "rules.toml"))


def test_neither_a_preset_nor_a_file() -> None:
    with pytest.raises(InvalidInput, match="^there is no file 'no.toml', and --rules has the presets default, gopher,"):
        FilterPlan.read("no.toml")
    with pytest.raises(InvalidInput, match=r"^--languages is \['e'\]; give codes"):
        FilterPlan.read("default", languages=["e"])
