"""What an encoder was handed, and so what a commit's error figures are measured against.

Targets may have been encoded before they came to the encoder that a commit speaks of. Each such step is a part of the
provenance's capture path, behind the engine's own:

    sampler                                       the teacher's answers
    sampler, journal                              the same: a journal's rows came along bit by bit, with their figures
    sampler, journal of u8 within 0.0635          a journal's rows were decoded from u8 and encoded again
    sampler, journal partly of u8 within 0.0635   some of them were
    sampler, import of u8 within 0.0635           an export of targets that were kept as u8
    sampler, import                               nobody knows how far what was imported is from the teacher

There and not among the figures, because a manifest keeps one list of figures for all commits of a set, and shards of
one set come from imports, journals and teachers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from potstill.cache.encoding.logprobs import Encoding
from potstill.cache.types import JSON

_IMPORT = "import"
_JOURNAL = "journal"
_STEP = re.compile(
    rf"(?P<how>{_IMPORT}|{_JOURNAL})"
    r"(?:(?P<partly> partly)? of (?P<name>\w+) within (?P<bound>\d+(?:\.\d+)?(?:e-\d+)?))?"
)


@dataclass(frozen=True, slots=True)
class Handed:
    """What an encoder was handed."""

    words: str
    max_abs_error: float | None
    """How far it is at most from the teacher, in nats, saturated entries apart; 0 for its own answers, None for not
    known."""

    @classmethod
    def of(cls, capture_path: str) -> Handed:
        """What the capture path of a commit says."""
        steps = [found for part in capture_path.split(", ") if (found := _STEP.fullmatch(part))]
        came_by_import = any(step["how"] == _IMPORT for step in steps)
        # A journal without a bound is bits as they were, an import without one may be anything.
        if any(step["how"] == _IMPORT and step["bound"] is None for step in steps):
            return cls("what was imported, of unknown error", None)
        lossy = [step for step in steps if float(step["bound"] or 0)]
        if not lossy:
            return cls("the teacher", 0.0)
        within = sum(float(step["bound"]) for step in lossy)
        kept_as = f"{', then '.join(step['name'] for step in lossy)}, within {within:g} of the teacher"
        if came_by_import:
            return cls(f"what was imported: {kept_as}", within)
        partly = "the teacher, and for some rows " if all(step["partly"] for step in lossy) else ""
        return cls(f"{partly}what the journal kept: {kept_as}", within)


ONLY_BOUNDED = Handed("not measured: an earlier compact added bounds", None)
"""Of figures that `is_stated` finds."""


def imported(capture_path: str, kept_as: Mapping[str, JSON] | None) -> str:
    """The capture path behind an import of what was kept as that encoding (its `to_json`), None for not known."""
    step = _IMPORT
    if kept_as is not None:
        # A file says so, and may be of a version with more encodings than this one.
        told = f"{_IMPORT} of {kept_as.get('name')} within {kept_as.get('max_abs_error')}"
        step = told if _STEP.fullmatch(told) else _IMPORT
    return f"{capture_path}, {step}" if capture_path else step


def from_journal(capture_path: str, again: Encoding | None, *, partly: bool) -> str:
    """The capture path of a journal's rows, of which all or some were decoded from `again` and encoded once more."""
    if again is None or not again.max_abs_error:
        return f"{capture_path}, {_JOURNAL}"
    return f"{capture_path}, {_JOURNAL}{' partly' * partly} of {again.name} within {again.max_abs_error}"


def is_stated(error: Mapping[str, float], encoding: Encoding) -> bool:
    """Whether figures of journal rows have the encoding's bound in them and not only what was measured.

    No measured KL comes near a bound that is meant for logprobs.
    """
    return 0 < encoding.max_abs_error <= error.get("p999_kl", 0.0)


def measured_against(capture_path: str, error: Mapping[str, float], encoding: Encoding) -> Handed:
    """What the figures of a commit compare the decoded targets with."""
    came_by_journal = any(part.startswith(_JOURNAL) for part in capture_path.split(", "))
    return ONLY_BOUNDED if came_by_journal and is_stated(error, encoding) else Handed.of(capture_path)
