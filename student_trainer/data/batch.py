"""Rows and targets as tensors.

Reading is the same for every source, order and number of workers: row indexes go in, a `Batch` comes out.

A teacher that sees a prefix (BOS) in front of each row teaches a student that sees it, too. No target is the prefix's:
the first label of a row is its second token, as without a prefix.

Shape legend:  N rows of a corpus, B rows of the tensors, T tokens of the fullest of them, K kept ids, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.cache.corpus import Corpus
from potstill.cache.errors import PotstillError
from potstill.cache.forks import PerProcess
from potstill.cache.types import Targets, Tokens
from potstill.clients.patience import Patience, has_no_answer
from potstill.student_trainer.data.checks import check_alignment, check_lengths, check_mass
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.laying import Places, laid_rows, laid_targets
from potstill.student_trainer.data.sources import TargetSource, read_all
from potstill.student_trainer.losses import NO_LABEL, TeacherTargets

T = TypeVar("T")
_OPENERS = 16
_Read = tuple[list[Tokens], list[NDArray[np.bool_]], list[list[Targets]]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows, one after the other in those of the tensors, and padded on the right."""

    tokens: Tensor
    """[B, T] int64, the prefix in front of each row; 0 where padded."""
    mask: Tensor
    """[B, T] bool, true where the target is learnt; False at the prefix, where padded and where the corpus says so."""
    labels: Tensor
    """[B, T] int64: the next token; `NO_LABEL` at the last token of a row and where `mask` is False."""
    teachers: tuple[TeacherTargets, ...]
    """One per source: ids int32 [B, T, K], logprobs and log_tail float32; nothing (-inf) at the prefix and where
    padded."""
    lengths: Tensor
    """[B] int64: tokens, prefixes among them, without padding."""
    position_ids: Tensor | None = None
    """[B, T] int64, from 0 in each row, 0 where padded; None where none shares a row of the tensors with another."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a causal language model's forward pass.

        No mask: padding is on the right, where no token looks. With a cache `transformers` would not keep rows apart.
        """
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.tokens, "use_cache": False, **positions}

    @property
    def real(self) -> Tensor:
        """[B, T] bool, False where padded."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def num_positions(self) -> int:
        """Targets that are learnt."""
        return int(self.mask.sum())

    @property
    def num_labels(self) -> int:
        """Targets that are learnt and have a next token."""
        return int((self.labels != NO_LABEL).sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        own = (self.tokens, self.mask, self.labels, self.lengths, self.position_ids)
        theirs = (tensor for teacher in self.teachers for tensor in teacher.tensors)
        return sum(tensor.nbytes for tensor in chain(own, theirs) if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `change` to every tensor, as to move them to a device."""
        return Batch(
            change(self.tokens),
            change(self.mask),
            change(self.labels),
            tuple(teacher.each(change) for teacher in self.teachers),
            change(self.lengths),
            None if self.position_ids is None else change(self.position_ids),
        )

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self if device == self.tokens.device else self.each(lambda tensor: tensor.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row with its targets, as they were read."""

    tokens: Tokens
    """[T] without the prefix."""
    taught: NDArray[np.bool_]
    """[T] whether each target is to be learnt."""
    targets: tuple[Targets, ...]
    """One per source, of T positions."""


@dataclass(frozen=True, slots=True, eq=False)
class RowCounts:
    """Counts of some rows that need no targets."""

    lengths: NDArray[np.int64]
    """[N] tokens of each, the prefix among them."""
    num_labels: int
    """As of a `Batch` of them."""
    num_positions: int


@dataclass(frozen=True, slots=True, eq=False)
class BatchReader:
    """Reads rows of a corpus with every source's targets; thread-safe."""

    corpus: Corpus | JoinedCorpora
    sources: tuple[TargetSource, ...] = ()
    weights: tuple[float, ...] = ()
    """One per source."""
    prefix: tuple[int, ...] = ()
    """Token ids in front of every row; those of its teachers (`common_prefix`)."""
    waiting: PerProcess[threading.Lock] = field(default_factory=lambda: PerProcess(threading.Lock), repr=False)
    """Lock of the one reader that goes on asking a source that does not answer."""
    given_up: PerProcess[list[PotstillError]] = field(default_factory=lambda: PerProcess(list), repr=False)
    """The error of that one, if it had no patience left: the others need not try theirs."""
    patience: Patience | None = field(default=None, repr=False)
    """With sources that do not answer; without one their errors are raised at once."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, with its prefix."""
        corpus = self.corpus
        longest = corpus.longest_row if isinstance(corpus, JoinedCorpora) else corpus.spec.longest_row
        return longest + len(self.prefix)

    @property
    def is_stored(self) -> bool:
        """True where all that is read lies in a cache's objects, so that no teacher is asked for more at a time."""
        return all(source.stored for source in self.sources)

    def without_targets(self) -> BatchReader:
        """A reader of the same rows that asks no source, for plain cross-entropy."""
        return replace(self, sources=(), weights=())

    def read(self, indexes: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read the rows at `indexes` as one batch, in that order, each in a row of its own; raises as `read_packed`."""
        return self.read_packed([[int(i)] for i in indexes])

    def read_packed(self, bins: Sequence[Sequence[int]]) -> Batch:
        """Read rows as one batch; those of a bin share a row of its tensors, in that order.

        Without any bin it is a batch of one padded token, from which nothing is learnt.

        Raises:
            TeacherFailed: a source answers with another number of rows or positions than it was asked for, with NaN
                or a mass over 1, or with targets that are not of the next tokens.
            PotstillError: whatever a source raises.
        """
        return next(self.read_many([bins]))

    def read_many(self, batches: Sequence[Sequence[Sequence[int]]]) -> Iterator[Batch]:
        """Read the rows of some batches together, and lay one batch after the other; each raises as `read_packed`."""
        try:
            examples = iter(self.examples([row for bins in batches for each in bins for row in each]))
        except PotstillError as error:
            if len(batches) == 1 or has_no_answer(error):
                raise
            for bins in batches:  # so that those before the one to blame are there
                yield self.read_packed(bins)
        else:
            for bins in batches:
                yield self.laid([[next(examples) for _ in each] for each in bins])

    def examples(self, indexes: Sequence[int] | NDArray[np.int64]) -> list[Example]:
        """Read the rows at `indexes` with their targets, in that order; raises as `read_packed`."""
        wanted = [int(i) for i in indexes]
        if not wanted:
            return []
        rows, masks, answers = self._answer(lambda: self._read(wanted))
        for source, targets in zip(self.sources, answers, strict=True):
            self._check(source, wanted, rows, targets)
        by_row = zip(*answers, strict=True) if answers else [()] * len(rows)
        return [Example(*each) for each in zip(rows, masks, by_row, strict=True)]

    def laid(self, bins: Sequence[Sequence[Example]]) -> Batch:
        """Lay rows into the tensors of a batch, those of a bin one after the other."""
        examples = [example for each in bins for example in each]
        lengths = [len(self.prefix) + len(example.tokens) for example in examples]
        places = Places.of([len(each) for each in bins], lengths, len(self.prefix))
        tokens, mask, labels = laid_rows(
            [each.tokens for each in examples], [each.taught for each in examples], self.prefix, places
        )
        teachers = tuple(
            laid_targets([example.targets[m] for example in examples], weight, len(self.prefix), places)
            for m, weight in enumerate(self.weights)
        )
        return Batch(tokens, mask, labels, teachers, torch.tensor(places.filled), places.position_ids())

    def open_ahead(self, indexes: NDArray[np.int64]) -> None:
        """Read single rows in the background, so that what holds them and their neighbours is open when it is wanted.

        Errors are left to whoever wants the rows, and sources that would ask a teacher are left alone.
        """
        stored = [source for source in self.sources if source.stored]

        def touch(rows: list[int]) -> None:
            for row in rows:
                # RuntimeError: the process ends, and starts no threads any more.
                with suppress(PotstillError, RuntimeError):
                    read_all(stored, [row], self.corpus.take([row]))

        for part in np.array_split(indexes, min(len(indexes), _OPENERS)) if len(indexes) else ():
            threading.Thread(target=touch, args=(part.tolist(),), name="open-ahead", daemon=True).start()

    def measure(self, indexes: NDArray[np.int64]) -> RowCounts:
        """Count the tokens, labels and positions of rows, without their targets; raises as `read`."""
        return self._answer(lambda: self._measure(indexes))

    def _measure(self, indexes: NDArray[np.int64]) -> RowCounts:
        lengths = np.diff(self.corpus.row_ranges(indexes), axis=1)[:, 0]
        seen = lengths + len(self.prefix)
        if not self.corpus.has_loss_mask:
            num_positions = int(lengths.sum())
            return RowCounts(seen, num_positions - len(indexes), num_positions)
        masks = self.corpus.take_loss_mask(indexes.tolist())
        return RowCounts(seen, sum(int(mask[:-1].sum()) for mask in masks), sum(int(mask.sum()) for mask in masks))

    def _check(
        self, source: TargetSource, wanted: Sequence[int], rows: Sequence[Tokens], answers: Sequence[Targets]
    ) -> None:
        def place(i: int) -> tuple[str, int]:
            if isinstance(self.corpus, JoinedCorpora):
                return self.corpus.place(wanted[i])
            return self.corpus.name, wanted[i]

        check_lengths(source.name, rows, answers)
        if not source.normalised:
            check_mass(source.name, answers, place)
        check_alignment(source.name, rows, answers, place)

    def _answer(self, ask: Callable[[], T]) -> T:
        if self.patience is None:
            return ask()
        try:
            return ask()
        except PotstillError as error:
            if not has_no_answer(error):
                raise
            first = error
        # One reader at a time goes on asking, so that a service that comes back is not met by all, nor told of by each.
        with self.waiting.get():
            for told in self.given_up.get():
                raise told from first
            try:
                return self.patience.answer(ask)
            except PotstillError as error:
                if has_no_answer(error):
                    self.given_up.get().append(error)
                raise

    def _read(self, wanted: Sequence[int]) -> _Read:
        rows = self.corpus.take(wanted)
        masks = self.corpus.take_loss_mask(wanted) if self.corpus.has_loss_mask else _all_taught(rows)
        return rows, masks, read_all(self.sources, wanted, rows)


def _all_taught(rows: Sequence[Tokens]) -> list[NDArray[np.bool_]]:
    return [np.ones(len(row), dtype=np.bool_) for row in rows]
