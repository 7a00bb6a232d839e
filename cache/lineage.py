"""Lineage: what an encoder was handed, and so what a commit's error figures are measured against.

Targets may have been encoded before they came to the encoder that a commit speaks of. Each such time is a step of the
provenance; here as `Provenance.whole_path` tells it:

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

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potstill.cache.errors import FormatError

IMPORT = "import"
JOURNAL = "journal"
# What `Step.__str__` gives: records of before steps have it in their capture path.
_TOLD = re.compile(
    rf"(?P<how>{IMPORT}|{JOURNAL})"
    r"(?:(?P<partly> partly)? of (?P<encoding>\w+) within (?P<bound>\d+(?:\.\d+)?(?:e-\d+)?))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One encoding that targets went through on their way from the teacher."""

    how: str
    """`import` or `journal`: what decoded them again."""
    encoding: str = ""
    """Its name; empty for rows that came along bit by bit, and where nobody knows it."""
    max_abs_error: float | None = 0.0
    """How far they are at most from what was encoded, in nats, saturated entries apart; None where nobody knows."""
    partly: bool = False
    """Other rows came along bit by bit."""

    def __str__(self) -> str:
        """The step in words, as `journal partly of u8 within 0.0635`."""
        if not self.encoding:
            return self.how
        return f"{self.how}{' partly' * self.partly} of {self.encoding} within {self.max_abs_error}"

    @classmethod
    def imported(cls, kept_as: Mapping[str, Any] | None) -> Step:
        """The import of what was kept as an encoding (its `to_json`); of unknown error when that does not say it."""
        said: Mapping[str, Any] = kept_as or {}
        name, bound = said.get("name"), said.get("max_abs_error")
        # A file says so, and may be of a version with more encodings than this one.
        if isinstance(name, str) and name.isidentifier() and isinstance(bound, float) and 0 <= bound < math.inf:
            return cls(how=IMPORT, encoding=name, max_abs_error=bound)
        return cls(how=IMPORT, max_abs_error=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key per attribute."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Step:
        """Read what `to_json` wrote; unknown keys, of a newer writer, are ignored.

        Raises:
            FormatError: a key is missing or of the wrong type.
        """
        try:
            step = cls(**{name: value[name] for name in cls.__dataclass_fields__})
            within = step.max_abs_error is None or 0 <= step.max_abs_error < math.inf
        except (KeyError, TypeError) as error:
            raise FormatError(f"a step of a provenance has wrong keys: {error!r}") from error
        if not (isinstance(step.how, str) and isinstance(step.encoding, str) and within):
            raise FormatError(f"a step of a provenance cannot be read: {value!r}")
        return step


def path_and_steps(path: str, steps: Any) -> tuple[str, tuple[Step, ...]]:
    """The engine's capture path and the steps behind it; a record without steps may have them as words of its path.

    Raises:
        FormatError: steps that cannot be read.
    """
    if isinstance(steps, list):
        return path, tuple(map(Step.from_json, steps))
    if steps is not None:
        raise FormatError(f"the steps of a provenance are {steps!r}; they must be a list")
    parts = [(part, _TOLD.fullmatch(part)) for part in path.split(", ")]
    return ", ".join(part for part, step in parts if not step), tuple(_step(step) for _, step in parts if step)


def _step(told: re.Match[str]) -> Step:
    how, partly, encoding, bound = told.group("how", "partly", "encoding", "bound")
    if encoding is None:
        return Step(how=how, max_abs_error=None if how == IMPORT else 0.0)
    return Step(how=how, encoding=encoding, max_abs_error=float(bound), partly=bool(partly))


@dataclass(frozen=True, slots=True)
class Handed:
    """What an encoder was handed."""

    words: str
    max_abs_error: float | None
    """How far it is at most from the teacher, in nats, saturated entries apart; 0 for its own answers, None for not
    known."""

    @classmethod
    def after(cls, steps: Sequence[Step]) -> Handed:
        """What comes out of the steps."""
        if any(step.max_abs_error is None for step in steps):
            return cls("what was imported, of unknown error", None)
        lossy = [step for step in steps if step.max_abs_error]
        if not lossy:
            return cls("the teacher", 0.0)
        within = sum(step.max_abs_error or 0.0 for step in lossy)
        kept_as = f"{', then '.join(step.encoding for step in lossy)}, within {within:g} of the teacher"
        if any(step.how == IMPORT for step in steps):
            return cls(f"what was imported: {kept_as}", within)
        partly = "the teacher, and for some rows " if all(step.partly for step in lossy) else ""
        return cls(f"{partly}what the journal kept: {kept_as}", within)


ONLY_BOUNDED = Handed("not measured: an earlier compact added bounds", None)
"""Of figures that `is_stated` finds."""


def is_stated(error: Mapping[str, float], bound: float) -> bool:
    """True of figures of journal rows that have their encoding's bound in them and not only what was measured.

    No measured KL comes near a bound that is meant for logprobs.
    """
    return 0 < bound <= error.get("p999_kl", 0.0)


def measured_against(steps: Sequence[Step], error: Mapping[str, float], bound: float) -> Handed:
    """What the figures of a commit, in an encoding of this bound, compare the decoded targets with."""
    by_journal = any(step.how == JOURNAL for step in steps)
    return ONLY_BOUNDED if by_journal and is_stated(error, bound) else Handed.after(steps)
