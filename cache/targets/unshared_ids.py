"""Ids that mean another token to a teacher than to a corpus, and that no row of the corpus uses.

Siblings of one tokenizer often differ in a few added tokens only. A corpus of one can be scored by a teacher of the
other as long as each id in its rows is the same token to both. The ids that are not are recorded with the targets: a
teacher may give them mass, and to the corpus's tokenizer they mean something else or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.tokenizer import token_table
from potstill.cache.errors import FormatError, SpecMismatch
from potstill.cache.plurals import counted
from potstill.cache.types import TeacherIdentity

_Table: TypeAlias = dict[int, tuple[bytes, bool]]
"""Bytes of each id, and whether it is special."""
_BLOCK = 1 << 22
_TOLD = 3


@dataclass(frozen=True, slots=True)
class UnsharedIds:
    """A set of token ids."""

    ranges: tuple[tuple[int, int], ...] = ()
    """Rising ranges of ids without touching ones, each from its first to one past its last."""

    @classmethod
    def of(cls, ids: NDArray[np.int64]) -> UnsharedIds:
        """Make the set of rising ids [N]."""
        if not len(ids):
            return cls()
        breaks = np.flatnonzero(np.diff(ids) > 1) + 1
        edges = [0, *breaks.tolist(), len(ids)]
        return cls(tuple((int(ids[start]), int(ids[stop - 1]) + 1) for start, stop in pairwise(edges)))

    @classmethod
    def from_json(cls, value: Any) -> UnsharedIds:
        """Read a list of `[start, stop]`; a record without one has no such ids.

        Raises:
            FormatError: it is something else.
        """
        if value is None:
            return cls()
        try:
            ranges = tuple((start, stop) for start, stop in value)
        except (TypeError, ValueError) as error:
            raise FormatError(f"unshared_ids is {value!r:.80}; it must be a list of [start, stop]") from error
        flat = [-1, *(edge for each in ranges for edge in each)]
        if not all(type(edge) is int for edge in flat) or any(a >= b for a, b in pairwise(flat)):
            raise FormatError(f"unshared_ids is {value!r:.80}; its ranges must rise")
        return cls(ranges)

    def to_json(self) -> list[list[int]]:
        """Convert to a list of `[start, stop]`."""
        return [list(each) for each in self.ranges]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def __contains__(self, token_id: int) -> bool:
        return any(start <= token_id < stop for start, stop in self.ranges)

    def holds(self, ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Mask, shaped like `ids`, of those that are in the set."""
        edges = np.array(self.ranges, np.int64).reshape(-1)
        inside: NDArray[np.bool_] = np.searchsorted(edges, ids, side="right") % 2 == 1
        return inside

    @property
    def text(self) -> str:
        """The set in words, as in `2 ids (256, 260 to 262)`."""
        shown = [str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in self.ranges]
        more = ", ..." if len(shown) > _TOLD else ""
        return f"{counted(len(self), 'id')} ({', '.join(shown[:_TOLD])}{more})"


def unshared_ids(teacher: str, corpus: Corpus, identity: TeacherIdentity, tokenizer: Tokenizer) -> UnsharedIds:
    """Compare a teacher's tokenizer with that of a corpus; reads the corpus's tokens where they might tell them apart.

    Args:
        teacher: name of the teacher.
        corpus: the rows.
        identity: of the teacher, with its prefix.
        tokenizer: the teacher's.

    Raises:
        SpecMismatch: a row, or the teacher's prefix, has an id that means different tokens to the two.
        CorruptSegment: stored bytes are damaged.
    """
    ours, theirs = token_table(corpus.tokenizer), token_table(tokenizer)
    differing = np.array(sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)), np.int64)
    uses = _uses(corpus, differing)
    for token_id in identity.prefix_ids:
        if token_id in differing:
            uses.setdefault(token_id, 0)
    if uses:
        told = "; ".join(_told(i, ours, theirs, uses[i]) for i in list(uses)[:_TOLD])
        more = f"; and {len(uses) - _TOLD:,} more" if len(uses) > _TOLD else ""
        raise SpecMismatch(
            f"{counted(len(uses), 'id')} of corpus {corpus.name!r} mean other tokens to teacher {teacher!r}: {told}"
            f"{more}; ingest the text again with the teacher's tokenizer"
        )
    return UnsharedIds.of(differing)


def _uses(corpus: Corpus, differing: NDArray[np.int64]) -> dict[int, int]:
    """Count the positions of each differing id that a row uses, by rising id."""
    size = corpus.spec.max_token_id + 1
    inside = differing[differing < size]
    if not len(inside):
        return {}
    wanted = np.zeros(size, bool)
    wanted[inside] = True
    counts = np.zeros(size, np.int64)
    for start in range(0, corpus.num_positions, _BLOCK):
        tokens = corpus.tokens(start, min(start + _BLOCK, corpus.num_positions))
        counts += np.bincount(tokens[wanted[tokens]], minlength=size)
    return {token_id: int(counts[token_id]) for token_id in inside.tolist() if counts[token_id]}


def _told(token_id: int, ours: _Table, theirs: _Table, count: int) -> str:
    place = f"in {counted(count, 'position')}" if count else "in the teacher's prefix"
    return f"id {token_id} ({place}) is {_shown(ours, token_id)}, to the teacher {_shown(theirs, token_id)}"


def _shown(table: _Table, token_id: int) -> str:
    if token_id not in table:
        return "nothing"
    data, special = table[token_id]
    return f"{'special ' * special}{data.decode(errors='replace')!r:.40}"
