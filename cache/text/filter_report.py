"""Report of what a filter read, kept and dropped; written beside what it kept, where an ingest passes it by."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.cache.corpus.seal import Source
from potstill.cache.corpus.sources.files import FILTER_REPORT
from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import json_object, read_named

SAMPLES = 3
_SHOWN = 200  # characters of a sample
_KIND = "potstill filter"


@dataclass(slots=True)
class Amount:
    """Documents, and the characters in them."""

    documents: int = 0
    characters: int = 0

    def add(self, text: str) -> None:
        """Add one document."""
        self.documents += 1
        self.characters += len(text)


@dataclass(slots=True)
class Dropped(Amount):
    """Documents that one rule dropped; several may drop one document."""

    alone: int = 0
    """Documents that no other rule drops, of those that look at the same document."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Some of them, drawn at random: place, measured value, beginning of the text; of copies also what they copy."""

    def add_sample(self, sample: dict[str, Any], chance: random.Random) -> None:
        """Take a document that was counted as a sample, each with the same probability."""
        place = len(self.samples) if len(self.samples) < SAMPLES else chance.randrange(self.documents)
        if place < SAMPLES:
            self.samples[place : place + 1] = [sample]


class FilterCounts:
    """Counts of a filter, which grow while it runs."""

    def __init__(self) -> None:
        self.read = Amount()
        self.kept = Amount()
        self.languages: dict[str, Amount] = {}
        """What was kept, by language."""
        self.dropped: dict[str, Dropped] = {}
        """By the name of the measure, or `empty`, `exact_duplicate`, `language`, `near_duplicate`."""
        self.left_out: Counter[str] = Counter()
        """Bad records and files of unknown kinds."""
        self.first_bad = ""
        """Message of the first bad record."""
        self._chance = random.Random(0)  # noqa: S311 -- the same samples each time

    def keep(self, text: str, language: str) -> None:
        """Count a document that is kept."""
        self.kept.add(text)
        self.languages.setdefault(language, Amount()).add(text)

    def drop(self, text: str, where: str, reasons: Mapping[str, float | str | None]) -> None:
        """Count a document that is dropped, by each reason; their values are what was measured."""
        for name, value in reasons.items():
            self._drop(name, text, {**_shown(text, where), "value": value}, alone=len(reasons) == 1)

    def drop_copy(self, text: str, where: str, reason: str, original: int) -> None:
        """Count a document that is dropped as a copy of another, which is given by its number."""
        self._drop(reason, text, {**_shown(text, where), "value": None, "copy_of": original}, alone=True)

    @property
    def originals(self) -> set[int]:
        """Numbers of the documents of which the samples are copies."""
        return {sample["copy_of"] for each in self.dropped.values() for sample in each.samples if "copy_of" in sample}

    def show_originals(self, found: Mapping[int, tuple[str, str]]) -> None:
        """Put text and place of documents in place of their numbers."""
        for dropped in self.dropped.values():
            for sample in dropped.samples:
                original = found.get(sample.pop("copy_of", -1))
                if original is not None:  # else its file has changed since it was read
                    sample["copy_of"] = _shown(*original)

    def _drop(self, reason: str, text: str, sample: dict[str, Any], *, alone: bool) -> None:
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.add(text)
        dropped.alone += alone
        dropped.add_sample(sample, self._chance)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON; what dropped most stands first."""
        dropped = sorted(self.dropped.items(), key=lambda item: -item[1].documents)
        languages = sorted(self.languages.items(), key=lambda item: -item[1].characters)
        return {
            "read": asdict(self.read),
            "kept": asdict(self.kept),
            "languages": {name: asdict(amount) for name, amount in languages},
            "dropped": {name: asdict(found) for name, found in dropped},
        }


def _shown(text: str, where: str) -> dict[str, Any]:
    return {"where": where, "text": text.strip()[:_SHOWN]}


def write_report(
    folder: Path,
    settings: Mapping[str, Any],
    sources: Sequence[Source],
    outputs: Sequence[Source],
    counts: FilterCounts,
) -> None:
    """Write the report into the folder of what was kept."""
    report = {
        "kind": _KIND,
        "settings": settings,
        "sources": [asdict(each) for each in sources],
        "outputs": [asdict(each) for each in outputs],
        **counts.to_json(),
        "left_out": dict(counts.left_out),
    }
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (folder / FILTER_REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a filter's folder.

    Raises:
        InvalidInput: there is none.
    """
    path = folder / FILTER_REPORT
    if not path.is_file():
        raise InvalidInput(f"{str(folder)!r} holds no {FILTER_REPORT}; name a folder that `potstill filter` made")
    report = json_object(read_named(path), str(path))
    if report.get("kind") != _KIND:
        raise InvalidInput(f"{path} is not what `potstill filter` writes; name a folder that it made")
    return report
