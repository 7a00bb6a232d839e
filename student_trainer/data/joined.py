"""Several corpora of one tokenizer as one: their rows end to end, with every teacher's targets of each.

Shape legend:  M corpora, R rows of all together, D documents, N rows asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.errors import SpecMismatch, TeacherFailed
from potstill.cache.plurals import counted
from potstill.cache.types import Targets, Tokens
from potstill.student_trainer.data.sources import TargetSource

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class JoinedCorpora:
    """Rows of one or more corpora; row i of the second has the index that follows the last one of the first."""

    corpora: tuple[Corpus, ...]

    def __post_init__(self) -> None:
        """Check that an id is the same token in each.

        Raises:
            SpecMismatch: two corpora were made with different tokenizers.
        """
        first = self.corpora[0]
        for corpus in self.corpora:
            if corpus.tokenizer_sha256 != first.tokenizer_sha256:
                raise SpecMismatch(
                    f"corpus {corpus.name!r} has tokenizer {corpus.tokenizer_sha256[:12]}, but {first.name!r} has "
                    f"{first.tokenizer_sha256[:12]}; a student learns one tokenizer"
                )

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """Rows [M+1] at which each corpus begins, then R."""
        return np.cumsum([0, *map(len, self.corpora)])

    @property
    def document_rows(self) -> NDArray[np.int64]:
        """Rows [D+1] at which each document starts, then R."""
        pairs = zip(self.corpora, self.first_rows, strict=False)
        starts = [corpus.document_rows[:-1] + first for corpus, first in pairs]
        return np.concatenate([*starts, [len(self)]])

    @property
    def has_loss_mask(self) -> bool:
        """Tell whether some target is not to be learnt."""
        return any(corpus.has_loss_mask for corpus in self.corpora)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return max(corpus.spec.longest_row for corpus in self.corpora)

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, in hex: the corpus's own, or that of all of them."""
        all_of_them = [corpus.fingerprint for corpus in self.corpora]
        return all_of_them[0] if len(all_of_them) == 1 else hashlib.sha256("".join(all_of_them).encode()).hexdigest()

    def joined(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Turn rising rows of each corpus into rows of all together, rising."""
        return np.concatenate([part + first for part, first in zip(rows, self.first_rows, strict=False)])

    def place(self, row: int) -> tuple[str, int]:
        """Name the corpus of a row of all together, and the row's number in it."""
        m = int(np.searchsorted(self.first_rows[1:-1], row, side="right"))
        return self.corpora[m].name, row - int(self.first_rows[m])

    def take(self, rows: Sequence[int]) -> list[Tokens]:
        """Read the tokens of rows in any order, each [T] uint32; raises as `Corpus.take`."""
        return self._gathered(rows, lambda m, _, own: self.corpora[m].take(own))

    def take_loss_mask(self, rows: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Read the loss mask of rows in any order, each [T] bool; raises as `Corpus.take_loss_mask`."""
        return self._gathered(rows, lambda m, _, own: self.corpora[m].take_loss_mask(own))

    def row_ranges(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the positions [N, 2] at which rows start and end, each in its own corpus."""
        return np.array(self._gathered(rows, lambda m, _, own: list(self.corpora[m].row_ranges(own)))).reshape(-1, 2)

    def source(self, parts: Sequence[TargetSource]) -> TargetSource:
        """Make one source of a teacher's sources of each corpus.

        Raises:
            SpecMismatch: they are not of one teacher.
        """
        first = parts[0]
        for part, corpus in zip(parts, self.corpora, strict=True):
            if differences := part.identity.differences(first.identity):
                raise SpecMismatch(
                    f"the targets of teacher {part.name!r} in {corpus.name!r} are another's: {differences}"
                )
        held = "; ".join(dict.fromkeys(part.held for part in parts))
        stored = all(part.stored for part in parts)
        read, normalised = partial(self._read, tuple(parts)), all(part.normalised for part in parts)
        top_k = all(part.top_k for part in parts)
        return TargetSource(first.name, first.identity, held, read, stored=stored, normalised=normalised, top_k=top_k)

    def _read(self, parts: Sequence[TargetSource], rows: Sequence[int], tokens: Sequence[Tokens]) -> list[Targets]:
        return self._gathered(rows, lambda m, at, own: parts[m].read(own, [tokens[i] for i in at]))

    def _gathered(
        self, rows: Sequence[int] | NDArray[np.int64], read: Callable[[int, list[int], list[int]], list[T]]
    ) -> list[T]:
        """Ask each corpus by `read(corpus, places among rows, rows of it)`; returns the answers in their order.

        Raises:
            TeacherFailed: there is not one answer a row.
        """
        found: dict[int, T] = {}
        for m, at, own in self._split(np.asarray(rows, dtype=np.int64)):
            answers = read(m, at, own)
            if len(answers) != len(at):
                name = self.corpora[m].name
                raise TeacherFailed(f"{counted(len(at), 'row')} of corpus {name!r} got {len(answers)} answers")
            found.update(zip(at, answers, strict=True))
        return [found[i] for i in range(len(rows))]

    def _split(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, list[int], list[int]]]:
        first = self.first_rows
        # A row outside all of them goes to the nearest, which says so.
        corpus_of = np.clip(np.searchsorted(first, rows, side="right") - 1, 0, len(self.corpora) - 1)
        for m in np.unique(corpus_of).tolist():
            at = np.flatnonzero(corpus_of == m)
            yield m, at.tolist(), (rows[at] - first[m]).tolist()
