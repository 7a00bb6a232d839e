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
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.cache.corpus import Corpus
from potstill.cache.errors import PotstillError
from potstill.cache.forks import PerProcess
from potstill.cache.types import Draws, Targets, Tokens
from potstill.clients.patience import Patience, has_no_answer
from potstill.student_trainer.data.checks import check_alignment, check_lengths, check_mass
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.sources import NO_ID, TargetSource, read_all
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
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        self.each(count)
        return sum(sizes)

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
        examples = iter(self.examples([row for each in bins for row in each]))
        return self.laid([[next(examples) for _ in each] for each in bins])

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
        places = _Places.of([len(each) for each in bins], lengths)
        tokens, mask, labels = _laid_rows(examples, self.prefix, places)
        teachers = tuple(
            _laid_targets([example.targets[m] for example in examples], weight, len(self.prefix), places)
            for m, weight in enumerate(self.weights)
        )
        return Batch(tokens, mask, labels, teachers, torch.from_numpy(places.filled), places.position_ids())

    def open_ahead(self, indexes: NDArray[np.int64]) -> None:
        """Read single rows in the background, so that what holds them and their neighbours is open when it is wanted.

        Errors are left to whoever wants the rows, and sources that would ask a teacher are left alone.
        """
        stored = [source for source in self.sources if source.stored]

        def touch(rows: list[int]) -> None:
            for row in rows:
                with suppress(PotstillError):
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


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Places of rows in the tensors of a batch."""

    bins: NDArray[np.int64]
    """[N] row of the tensors."""
    starts: NDArray[np.int64]
    """[N] first token in it."""
    stops: NDArray[np.int64]
    """[N] one past the last."""
    filled: NDArray[np.int64]
    """[B] tokens of each row of the tensors."""

    @classmethod
    def of(cls, sizes: Sequence[int], lengths: Sequence[int]) -> _Places:
        """Place rows of `lengths` [N] one after the other in bins of so many rows, `sizes` [B]."""
        bins = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        ends = np.cumsum(lengths, dtype=np.int64)
        before = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])]
        starts = ends - np.asarray(lengths, dtype=np.int64) - before[:-1][bins]
        return cls(
            bins,
            starts,
            starts + np.asarray(lengths, np.int64),
            np.diff(before) if len(sizes) else np.zeros(1, np.int64),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the tensors, at least one each."""
        return len(self.filled), max(int(self.filled.max()), 1)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Bin, start and stop of each row."""
        return zip(self.bins.tolist(), self.starts.tolist(), self.stops.tolist(), strict=True)

    def position_ids(self) -> Tensor | None:
        """Positions [B, T] int64 from 0 in each row, 0 where padded; None where each row has a bin to itself."""
        if not self.starts.any():
            return None
        begun = np.zeros(self.shape, dtype=np.int64)
        begun[self.bins, self.starts] = self.starts
        positions = np.arange(self.shape[1]) - np.maximum.accumulate(begun, axis=1)
        # Counted on where padded, they could leave a student's table of positions.
        return torch.from_numpy(np.where(np.arange(self.shape[1]) < self.filled[:, None], positions, 0))


def _laid_rows(examples: Sequence[Example], prefix: Sequence[int], places: _Places) -> tuple[Tensor, Tensor, Tensor]:
    tokens = np.zeros(places.shape, dtype=np.int64)
    mask = np.zeros(places.shape, dtype=np.bool_)
    labels = np.full(places.shape, NO_LABEL, dtype=np.int64)
    for (i, start, stop), example in zip(places, examples, strict=True):
        first = start + len(prefix)
        tokens[i, start:first] = prefix
        tokens[i, first:stop] = example.tokens
        mask[i, first:stop] = example.taught
        # Target t is of the token after row[t].
        labels[i, first : stop - 1] = np.where(example.taught[:-1], tokens[i, first + 1 : stop], NO_LABEL)
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(labels)


def _laid_targets(answers: Sequence[Targets], weight: float, prefix: int, places: _Places) -> TeacherTargets:
    k = max((targets.k for targets in answers), default=1)
    drawn_ids, drawn_counts = _laid_draws([each.draws for each in answers], prefix, places)
    no_mass = np.float32(-np.inf)
    return TeacherTargets(
        _laid([each.ids for each in answers], np.int32(NO_ID), prefix, places, k),
        _laid([each.logprobs for each in answers], no_mass, prefix, places, k),
        _laid([each.log_tail for each in answers], no_mass, prefix, places),
        weight,
        drawn_ids,
        drawn_counts,
        _laid_numbers([None if each.log_z is None else each.log_z[:, 0] for each in answers], prefix, places),
        _laid_numbers([each.entropy for each in answers], prefix, places),
        _laid_numbers([each.label_logprob for each in answers], prefix, places, filler=np.nan),
        _laid_alignment(answers, prefix, places),
    )


def _laid_alignment(answers: Sequence[Targets], prefix: int, places: _Places) -> Tensor | None:
    """Alignments [B, T, 3] of rows some of which have one: the others' targets are of the student's own tokenizer."""
    if all(each.alignment is None for each in answers):
        return None
    own = [
        np.zeros((each.num_positions, 3), np.float32) if each.alignment is None else each.alignment for each in answers
    ]
    return _laid(own, np.float32(0.0), prefix, places, 3)


def _laid_numbers(
    answers: Sequence[NDArray[np.float32] | None], prefix: int, places: _Places, *, filler: float = 0.0
) -> Tensor | None:
    """Numbers [B, T] of rows that all have some; else None."""
    there = [each for each in answers if each is not None]
    return _laid(there, np.float32(filler), prefix, places) if len(there) == len(answers) else None


def _laid(answers: Sequence[NDArray[Any]], filler: np.generic, prefix: int, places: _Places, *width: int) -> Tensor:
    """Values [B, T] or [B, T, `width`] of rows [T] or [T, at most `width`], and `filler` where there are none."""
    # Only what no row covers is filled: most of a step's values are written here, and once is enough.
    laid = np.empty((*places.shape, *width), dtype=filler.dtype)
    for i, filled in enumerate(places.filled.tolist()):
        laid[i, filled:] = filler
    for (i, start, stop), values in zip(places, answers, strict=True):
        first = start + prefix
        laid[i, start:first] = filler
        if width and values.shape[1] < width[0]:
            laid[i, first:stop, values.shape[1] :] = filler
            laid[i, first:stop, : values.shape[1]] = values
        else:
            laid[i, first:stop] = values
    return torch.from_numpy(laid)


def _laid_draws(
    answers: Sequence[Draws | None], prefix: int, places: _Places
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Ids and counts [B, T, D] of rows that all have draws; else None."""
    there = [each for each in answers if each is not None]
    if len(there) < len(answers):
        return None, None
    most = max((int(np.diff(each.offsets).max(initial=0)) for each in there), default=0)
    ids = np.full((*places.shape, most), NO_ID, dtype=np.int32)
    counts = np.zeros((*places.shape, most), dtype=np.int32)
    for (i, start, stop), draws in zip(places, there, strict=True):
        drawn = np.arange(most) < np.diff(draws.offsets)[:, None]
        at = slice(start + prefix, stop)
        ids[i, at][drawn], counts[i, at][drawn] = draws.ids, draws.counts
    return torch.from_numpy(ids), torch.from_numpy(counts)
