"""Checks of targets as they are read, before a student learns from them: their numbers, and that they are of the row.

Shape legend:  T tokens of a row, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Targets, Tokens

_MOST_MASS = 1.002
"""A cache takes a teacher's mass within 0.001 of 1, and float32 sums add less than another."""
_LABEL_ERROR = 0.1
"""Nats between a label's own logprob and its entry's: 1/16 + 0.001 by the coarsest encoding, and rounding."""
_RELATIVE_LABEL_ERROR = 0.01
_LEAST_KNOWN = 8
"""Labels from which a disagreement is no accident; one may be, where an encoding's gap is saturated."""
_LEAST_COUNTED = 256
_LOOKED_AT = 512
"""Positions of a corpus in a batch that are looked at for a shift, and the rest of their last row."""
_MORE_FOUND = 0.25
"""Share of tokens that a teacher finds more often at another place than at their own only when it is shifted."""

Place = Callable[[int], tuple[str, int]]
"""Names the corpus of the i-th of the rows that were read, and its number there."""


def check_lengths(teacher: str, rows: Sequence[Tokens], answers: Sequence[Targets]) -> None:
    """Check that there is one `Targets` a row, with one target a token.

    Raises:
        TeacherFailed: there is not.
    """
    if len(answers) != len(rows):
        raise TeacherFailed(f"teacher {teacher!r} answered {len(answers)} rows of {len(rows)}")
    for row, targets in zip(rows, answers, strict=True):
        if targets.num_positions != len(row):
            raise TeacherFailed(
                f"teacher {teacher!r} gave {targets.num_positions} targets for a row of {len(row)} tokens"
            )


def check_mass(teacher: str, answers: Sequence[Targets], place: Place) -> None:
    """Check that each target is a distribution: no mass over 1 but by rounding, and no NaN, nor in what is beside it.

    Raises:
        TeacherFailed: one is not; names the teacher, the row and the position.
    """
    for i, targets in enumerate(answers):
        with np.errstate(over="ignore"):
            mass = np.exp(targets.logprobs).sum(axis=1) + np.exp(targets.log_tail)
        for more in (targets.log_z, targets.entropy):
            if more is not None:
                mass = np.where(np.isnan(more).reshape(len(mass), -1).any(axis=1), np.nan, mass)
        if not mass.max(initial=0.0) <= _MOST_MASS:  # NaN is neither over nor under
            position = int((~(mass <= _MOST_MASS)).argmax())
            corpus, row = place(i)
            told = "NaN" if np.isnan(mass[position]) else f"a mass of {mass[position]:.4g}, over 1,"
            raise TeacherFailed(
                f"teacher {teacher!r} has {told} at position {position} of row {row} of corpus {corpus!r}; "
                "delete its targets and fill or import them again"
            )


def check_alignment(teacher: str, rows: Sequence[Tokens], answers: Sequence[Targets], place: Place) -> None:
    """Check that target t is the distribution of the token after `row[t]`, by the label's logprob beside the top-k.

    Where that was itself taken from the top-k (an import without labels), tokens are looked for: those after `row[t]`
    must not be found far more rarely than their neighbours.

    Raises:
        TeacherFailed: the targets of a corpus are of other tokens, as if shifted by one.
    """
    by_corpus: dict[str, list[tuple[Tokens, Targets]]] = {}
    for i, (row, targets) in enumerate(zip(rows, answers, strict=True)):
        pairs = by_corpus.setdefault(place(i)[0], [])
        # A shift is in all rows of a corpus: a few of each batch tell it, and cost the readers little.
        if len(row) > 2 and targets.k and sum(len(each) for each, _ in pairs) < _LOOKED_AT:
            pairs.append((row, targets))
    for corpus, pairs in by_corpus.items():
        told = _told_by_labels(pairs) or _told_by_tokens(pairs)
        if told:
            raise TeacherFailed(
                f"the targets of teacher {teacher!r} are not of the next tokens of corpus {corpus!r}: {told}; target t "
                "must be the distribution of the token after token t"
            )


def _told_by_labels(pairs: Sequence[tuple[Tokens, Targets]]) -> str:
    wrong, known = _wrong_labels(pairs, 0, 0)
    if known < _LEAST_KNOWN or 2 * wrong <= known:
        return ""
    told = f"its label_logprob contradicts its top-k at {wrong:,} of {known:,} positions"
    for shift in (1, -1):
        # Either the top-k alone was moved, or its labels' logprobs with it.
        for of_label in (shift, 0):
            moved, known = _wrong_labels(pairs, shift, of_label)
            if 10 * moved < known:
                return f"{told}, and agrees where they are shifted by {shift:+d}"
    return told


def _wrong_labels(pairs: Sequence[tuple[Tokens, Targets]], shift: int, of_label: int) -> tuple[int, int]:
    """Count positions whose label's logprob is not that of its entry, and positions where either is among the top-k.

    The label of position t is taken to be token t + 1 + `shift`, and its logprob the one at t + `of_label`.
    """
    wrong = known = 0
    for row, targets in pairs:
        first, stop = (0, len(row) - 1 - shift) if shift >= 0 else (-shift, len(row) - 1)
        found = _found(row, targets, first, stop, shift)
        label = targets.label_logprob[first + of_label : stop + of_label]
        there = ~np.isnan(label)
        error = _LABEL_ERROR + _RELATIVE_LABEL_ERROR * np.abs(np.where(there, label, 0.0).clip(min=-100.0))
        # A label that is not among the top-k is at most as likely as the last entry.
        least = targets.logprobs[first:stop].min(axis=1)
        held = found > -np.inf
        with np.errstate(invalid="ignore"):
            telling = there & (held | (label > least + error))
            right = held & (np.abs(found - label) <= error)
        wrong, known = wrong + int((telling & ~right).sum()), known + int(telling.sum())
    return wrong, known


def _told_by_tokens(pairs: Sequence[tuple[Tokens, Targets]]) -> str:
    derived = [(row, targets) for row, targets in pairs if np.isnan(targets.label_logprob[:-1]).any()]
    # Positions 1 to T - 3 have a token before, at and after the next one.
    counted = sum(max(len(row) - 3, 0) for row, _ in derived)
    if counted < _LEAST_COUNTED:
        return ""

    def share(shift: int) -> float:
        return sum(int((_found(row, of, 1, len(row) - 2, shift) > -np.inf).sum()) for row, of in derived) / counted

    own = share(0)
    for shift in (1, -1):
        if (other := share(shift)) > own + _MORE_FOUND:
            return f"its top-k holds {own:.0%} of them, but {other:.0%} where they are shifted by {shift:+d}"
    return ""


def _found(row: Tokens, targets: Targets, first: int, stop: int, shift: int) -> NDArray[np.float32]:
    """Logprobs [stop - first] of tokens t + 1 + `shift` among the top-k at t; -inf where they are not there."""
    tokens = row[first + 1 + shift : stop + 1 + shift]
    here = targets.ids[first:stop] == tokens[:, None]
    found: NDArray[np.float32] = np.where(here, targets.logprobs[first:stop], np.float32(-np.inf)).max(axis=1)
    return found
