"""Map from a teacher's ids to the student's ids with which the same text begins.

Shape legend:  V ids of the teacher, O of them that are open.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.projection.spelling import NONE, Spelling


class FirstTokens(NamedTuple):
    """The map, without regard to the text around, as the kernels take it."""

    inside: NDArray[np.int64]
    """[V] the student's first id for the text of each of the teacher's in the middle of a document; `NONE` for none."""
    at_start: NDArray[np.int64]
    """[V] the same where the text begins a document."""
    opening: NDArray[np.int64]
    """[V] number of an open id, `NONE` for others. After an open one the student's token may go on into what follows:
    the student has a token that the teacher spells by that id and more."""
    going_on: NDArray[np.bool_]
    """[O, 256] the bytes with which such a token goes on."""
    first_bytes: NDArray[np.int64]
    """[V] first byte of each of the teacher's ids, `NONE` where it spells nothing."""
    stays: NDArray[np.float64]
    """[O] share of an open id after which the student's token ends with it; see `Projector.with_shares`."""

    @classmethod
    def of(cls, student: Spelling, teacher: Spelling) -> FirstTokens:
        """Compare two tokenizers; equal ones are mapped id by id. All shares are 0."""
        first_bytes = np.array([data[0] if data else NONE for data in teacher.bytes_of], dtype=np.int64)
        if student.sha256 == teacher.sha256:
            same = np.arange(len(first_bytes))
            return cls(same, same, np.full_like(same, NONE), np.zeros((0, 256), np.bool_), first_bytes, np.zeros(0))
        inside = student.first_ids(teacher.bytes_of)
        at_start = inside
        if student.begins_with_space or teacher.begins_with_space:
            pieces = teacher.bytes_of
            if teacher.begins_with_space:
                pieces = [data.removeprefix(b" ") for data in pieces]
            at_start = student.first_ids(pieces, at_start=True)
        for text, token in teacher.special.items():
            inside[token] = at_start[token] = student.special.get(text, NONE)
        for special, theirs in ((teacher.bos, student.bos), (teacher.eos, student.eos)):
            if special != NONE:
                inside[special] = at_start[special] = theirs
        opening, going_on = _open(student, teacher)
        return cls(inside, at_start, opening, going_on, first_bytes, np.zeros(len(going_on)))


def _open(student: Spelling, teacher: Spelling) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number the ids of the teacher that the student's tokens go on from, and tell with which bytes they do."""
    special = set(student.special.values())
    pieces = [b"" if token in special else data for token, data in enumerate(student.bytes_of)]
    firsts = teacher.first_ids(pieces)
    lengths = teacher.lengths()
    longer = np.flatnonzero((firsts != NONE) & (lengths[firsts] < [len(piece) for piece in pieces]))
    begun, number = np.unique(firsts[longer], return_inverse=True)
    opening = np.full(len(lengths), NONE, dtype=np.int64)
    opening[begun] = np.arange(len(begun))
    going_on = np.zeros((len(begun), 256), dtype=np.bool_)
    following = [pieces[token][lengths[firsts[token]]] for token in longer.tolist()]
    going_on[number, following] = True
    return opening, going_on
