"""Bounds of what is measured, which decide on a text; and a filter's other settings, from a TOML file.

preset = "default"        # or "gopher", "fineweb"
languages = ["en", "de"]  # "un" for none that is told, as source code
duplicates = "near"       # or "exact", "keep"

[rules]                   # each in place of the preset's
words = {least = 50, most = 100000}
stop_words = {}           # no bound
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_toml
from potstill.cache.text.measures import MEASURES

Duplicates = Literal["near", "exact", "keep"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the most that a measure may be; None for no bound."""

    least: float | None = None
    most: float | None = None

    def hold(self, value: float) -> bool:
        """Tell whether a value is within."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def to_json(self) -> dict[str, float]:
        """Convert to a TOML or JSON table of the bounds that there are."""
        return {name: value for name in ("least", "most") if (value := getattr(self, name)) is not None}

    @classmethod
    def of(cls, value: Any, where: str) -> Self:
        """Read a table as of `to_json`.

        Raises:
            InvalidInput: it is none, or leaves no value; `where` names it.
        """
        given = value if isinstance(value, dict) else {"": value}
        if set(given) - {"least", "most"} or not all(type(each) in {int, float} for each in given.values()):
            raise InvalidInput(f"{where} is {value!r}; write {{least = NUMBER}}, {{most = NUMBER}}, both, or {{}}")
        bounds = cls(given.get("least"), given.get("most"))
        if bounds.least is not None and bounds.most is not None and bounds.least > bounds.most:
            raise InvalidInput(f"{where} has least {bounds.least} over most {bounds.most}, so nothing is left")
        return bounds


_GOPHER = {
    "words": Bounds(50, 100_000),
    "mean_word_length": Bounds(3, 10),
    "symbols": Bounds(most=0.1),
    "alphabetic_words": Bounds(least=0.8),
    "stop_words": Bounds(least=2),
    "bullet_lines": Bounds(most=0.9),
    "ellipsis_lines": Bounds(most=0.3),
    "duplicate_lines": Bounds(most=0.3),
    "duplicate_line_characters": Bounds(most=0.2),
    "duplicate_paragraphs": Bounds(most=0.3),
    "duplicate_paragraph_characters": Bounds(most=0.2),
    **{f"top_{n}_gram": Bounds(most=most) for n, most in {2: 0.2, 3: 0.18, 4: 0.16}.items()},
    **{f"duplicate_{n}_grams": Bounds(most=round(0.2 - n / 100, 2)) for n in range(5, 11)},
}
PRESETS: dict[str, Mapping[str, Bounds]] = {
    # Drops what is hardly text, and leaves manuals, source code and tables in, which the published rules do not.
    "default": {
        "words": Bounds(least=10),
        "mean_word_length": Bounds(2, 20),
        "symbols": Bounds(most=0.5),
        "alphabetic_words": Bounds(least=0.2),
        "bullet_lines": Bounds(most=0.95),
        "ellipsis_lines": Bounds(most=0.5),
        "duplicate_line_characters": Bounds(most=0.6),
        "top_2_gram": Bounds(most=0.5),
        "duplicate_10_grams": Bounds(most=0.6),
    },
    "gopher": _GOPHER,
    "fineweb": {
        **_GOPHER,
        "punctuated_lines": Bounds(least=0.12),
        "short_lines": Bounds(most=0.67),
        "duplicate_line_characters": Bounds(most=0.1),
    },
}
"""Bounds by the names of measures, by the names of presets; those of Gopher and FineWeb as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterPlan:
    """Settings that decide on a document."""

    bounds: Mapping[str, Bounds]
    """By the names of `MEASURES`."""
    languages: tuple[str, ...] | None = None
    """Codes of those to keep; None for all."""
    duplicates: Duplicates = "near"
    """Copies to leave out: near ones, exact ones alone, or none."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str = "the rules", options: Collection[str] = ()) -> Self:
        """Read the settings of a TOML file, `where`, but those that are from `options` of the command line.

        Raises:
            InvalidInput: a key, preset, measure or bound is none.
        """
        if unknown := set(settings) - {"preset", "languages", "duplicates", "rules"}:
            known = "preset, languages, duplicates and the table rules"
            raise InvalidInput(f"{where} has the key {min(unknown)!r}; there are {known}")
        duplicates, codes = (
            f"--{key}" if key in options else f"{key} of {where}" for key in ("duplicates", "languages")
        )
        preset = _one_of(settings.get("preset", "default"), list(PRESETS), f"preset of {where}")
        rules = settings.get("rules", {})
        if not isinstance(rules, dict):
            raise InvalidInput(f"rules of {where} is {rules!r}; make it a table, [rules]")
        for name in rules:
            _one_of(name, list(MEASURES), f"a rule of {where}")
        bounds = {name: Bounds.of(value, f"rule {name!r} of {where}") for name, value in rules.items()}
        languages = settings.get("languages")
        if languages is not None and not (languages and isinstance(languages, list) and all(map(_is_code, languages))):
            raise InvalidInput(f"{codes} is {languages!r}; give codes like ['en', 'de'], 'un' for unknown")
        return cls(
            bounds={name: each for name, each in {**PRESETS[preset], **bounds}.items() if each.to_json()},
            languages=None if languages is None else tuple(languages),
            duplicates=_one_of(settings.get("duplicates", "near"), get_args(Duplicates), duplicates),
        )

    @classmethod
    def read(cls, rules: str, languages: list[str] | None = None, duplicates: str | None = None) -> Self:
        """Read a preset's name or a TOML file; what else is given is in place of the file's.

        Raises:
            InvalidInput: the file cannot be read or has wrong settings.
        """
        settings = {"preset": rules} if rules in PRESETS else read_toml(_file(rules))
        given = {"languages": languages, "duplicates": duplicates}
        over = {name: value for name, value in given.items() if value is not None}
        return cls.of({**settings, **over}, rules, over.keys())

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        languages = None if self.languages is None else list(self.languages)
        rules = {name: bounds.to_json() for name, bounds in self.bounds.items()}
        return {"languages": languages, "duplicates": self.duplicates, "rules": rules}


def _file(rules: str) -> Path:
    if not Path(rules).is_file():
        raise InvalidInput(f"there is no file {rules!r}, and --rules has the presets {', '.join(PRESETS)}")
    return Path(rules)


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", value) is not None


def _one_of(value: Any, known: Any, what: str) -> Any:
    if value not in known:
        raise InvalidInput(f"{what} is {value!r}; there are {', '.join(known)}")
    return value
