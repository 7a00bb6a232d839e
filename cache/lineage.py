"""Lineage of targets: what their encoder was handed, and so what a commit's error figures are measured against.

Targets may have been encoded before they came to the encoder that a commit describes. Each earlier encoding is a step
of the provenance; in the words of `Provenance.whole_path`:

    sampler                                       the teacher's answers
    sampler, journal                              a journal's rows, copied bit by bit with their error figures
    sampler, journal of u8 within 0.0635          a journal's rows, decoded from u8 and encoded again
    sampler, journal partly of u8 within 0.0635   both kinds of a journal's rows
    sampler, import of u8 within 0.0635           an export of targets that were kept as u8
    sampler, import                               imported targets whose error is not known
    sampler, projection                           targets of another tokenizer, decoded and projected

Steps are in the provenance and not among the error figures, because a manifest keeps one list of figures for all
commits of a set, and the shards of a set come from imports, journals and teachers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.cache.errors import FormatError

IMPORT = "import"
PROJECTION = "projection"
JOURNAL = "journal"
# The text of `Step.__str__`, which records from before steps have in their capture path.
_TOLD = re.compile(
    rf"(?P<how>{IMPORT}|{JOURNAL}|{PROJECTION})"
    r"(?:(?P<partly> partly)? of (?P<encoding>\w+) within (?P<bound>\d+(?:\.\d+)?(?:e-\d+)?))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One encoding that targets went through on their way from the teacher."""

    how: str
    """`import`, `journal` or `projection`, which decoded the targets again."""
    encoding: str = ""
    """Name of the encoding; empty for rows that were copied bit by bit, and where it is not known."""
    max_abs_error: float | None = 0.0
    """Largest error of that encoding in nats, saturated entries apart; None where it is not known."""
    partly: bool = False
    """True when other rows were copied bit by bit."""

    def __str__(self) -> str:
        """Describe the step, as in `journal partly of u8 within 0.0635`."""
        if not self.encoding:
            return self.how
        return f"{self.how}{' partly' * self.partly} of {self.encoding} within {self.max_abs_error}"

    @classmethod
    def imported(cls, kept_as: Mapping[str, Any] | None) -> Step:
        """Make the step of an import from the encoding that a file names (its `to_json`), or with an unknown error."""
        said: Mapping[str, Any] = kept_as or {}
        name, bound = said.get("name"), said.get("max_abs_error")
        # Not looked up by name: the file may be of a version with more encodings than this one.
        if isinstance(name, str) and name.isidentifier() and isinstance(bound, float) and 0 <= bound < math.inf:
            return cls(how=IMPORT, encoding=name, max_abs_error=bound)
        return cls(how=IMPORT, max_abs_error=None)

    @classmethod
    def projected(cls) -> Step:
        """Make the step of a projection, which is no distance from what the teacher says of its own ids."""
        return cls(how=PROJECTION, max_abs_error=None)

    @classmethod
    def from_json(cls, value: Any) -> Step:
        """Read a JSON object with one key per attribute; unknown keys, of a newer writer, are ignored.

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
    """Read the engine's capture path and the steps after it; old records have the steps as words of their path.

    Raises:
        FormatError: the steps cannot be read.
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
        return Step(how=how, max_abs_error=0.0 if how == JOURNAL else None)
    return Step(how=how, encoding=encoding, max_abs_error=float(bound), partly=bool(partly))


@dataclass(frozen=True, slots=True)
class Handed:
    """Numbers that an encoder was handed, in words, and their distance from the teacher."""

    words: str
    max_abs_error: float | None
    """Largest distance in nats, saturated entries apart; 0 for the teacher's own answers, None where not known."""

    @classmethod
    def after(cls, steps: Sequence[Step]) -> Handed:
        """Describe the numbers that come out of these steps."""
        if any(step.how == PROJECTION for step in steps):
            return cls("what was projected from another tokenizer", None)
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
"""Stands for figures of which `is_stated` is true."""


def is_stated(error: Mapping[str, float], bound: float) -> bool:
    """Tell whether error figures of journal rows are or contain their encoding's bound, and were not only measured."""
    # No measured KL comes near a bound that is meant for single logprobs.
    return 0 < bound <= error.get("p999_kl", 0.0)


def measured_against(steps: Sequence[Step], error: Mapping[str, float], bound: float) -> Handed:
    """Describe what a commit's figures compare the decoded targets with; `bound` is that of its encoding."""
    by_journal = any(step.how == JOURNAL for step in steps)
    return ONLY_BOUNDED if by_journal and is_stated(error, bound) else Handed.after(steps)
