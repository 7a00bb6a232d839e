"""Rows and targets as padded tensors.

Reading is the same for every source, order and number of workers: row indexes go in, a `Batch` comes out.

A teacher that sees a prefix (BOS) in front of each row teaches a student that sees it, too. No target is the prefix's:
the first label of a row is its second token, as without a prefix.

Shape legend:  B rows, T tokens of the longest row with its prefix, K kept ids, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.cache.corpus import Corpus
from potstill.cache.forks import PerProcess
from potstill.cache.types import Targets, Tokens
from potstill.clients.patience import Patience
from potstill.student_trainer.data.checks import check_alignment, check_lengths, check_mass
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.data.sources import NO_ID, TargetSource
from potstill.student_trainer.losses import NO_LABEL, TeacherTargets

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows, padded on the right."""

    tokens: Tensor
    """[B, T] int64, the prefix in front; 0 where padded."""
    mask: Tensor
    """[B, T] bool, true where the target is learnt; False at the prefix, where padded and where the corpus says so."""
    labels: Tensor
    """[B, T] int64: the next token; `NO_LABEL` at the last token of a row and where `mask` is False."""
    teachers: tuple[TeacherTargets, ...]
    """One per source: ids int32 [B, T, K], logprobs and log_tail float32; nothing (-inf) at the prefix and where
    padded."""
    lengths: Tensor
    """[B] int64: tokens of each row, the prefix among them, without padding."""

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

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        if device == self.tokens.device:
            return self
        teachers = tuple(teacher.each(lambda tensor: tensor.to(device)) for teacher in self.teachers)
        tokens, mask, labels = self.tokens.to(device), self.mask.to(device), self.labels.to(device)
        return Batch(tokens, mask, labels, teachers, self.lengths.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class BatchReader:
    """Reads rows of a corpus with every source's targets."""

    corpus: Corpus | JoinedCorpora
    sources: tuple[TargetSource, ...] = ()
    weights: tuple[float, ...] = ()
    """One per source."""
    prefix: tuple[int, ...] = ()
    """Token ids in front of every row; those of its teachers (`common_prefix`)."""
    lock: PerProcess[threading.Lock] = field(default_factory=lambda: PerProcess(threading.Lock), repr=False)
    """Training reads ahead while evaluation reads: corpus and sources see one caller at a time."""
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
        """Read the rows at `indexes` as one batch, in that order.

        Raises:
            TeacherFailed: a source answers with another number of rows or positions than it was asked for, with NaN
                or a mass over 1, or with targets that are not of the next tokens.
            PotstillError: whatever a source raises.
        """
        wanted = [int(i) for i in indexes]
        rows, masks, answers = self._answer(lambda: self._read(wanted))
        for source, targets in zip(self.sources, answers, strict=True):
            self._check(source.name, wanted, rows, targets)
        tokens, mask, labels = _pad_rows(rows, masks, self.prefix)
        teachers = tuple(
            _pad_targets(targets, tokens.shape[1], weight, len(self.prefix))
            for targets, weight in zip(answers, self.weights, strict=True)
        )
        lengths = torch.tensor([len(self.prefix) + len(row) for row in rows])
        return Batch(tokens, mask, labels, teachers, lengths)

    def counts(self, indexes: NDArray[np.int64]) -> tuple[int, int]:
        """Count the labels and the positions of rows, as of a `Batch`, without their targets; raises as `read`."""
        return self._answer(lambda: self._counts(indexes))

    def _counts(self, indexes: NDArray[np.int64]) -> tuple[int, int]:
        # Without the lock: training must not wait for what is read ahead, and corpora may be read by several threads.
        if not self.corpus.has_loss_mask:
            num_positions = int(np.diff(self.corpus.row_ranges(indexes), axis=1).sum())
            return num_positions - len(indexes), num_positions
        masks = self.corpus.take_loss_mask(indexes.tolist())
        return sum(int(mask[:-1].sum()) for mask in masks), sum(int(mask.sum()) for mask in masks)

    def _check(self, teacher: str, wanted: Sequence[int], rows: Sequence[Tokens], answers: Sequence[Targets]) -> None:
        def place(i: int) -> tuple[str, int]:
            if isinstance(self.corpus, JoinedCorpora):
                return self.corpus.place(wanted[i])
            return self.corpus.name, wanted[i]

        check_lengths(teacher, rows, answers)
        check_mass(teacher, answers, place)
        check_alignment(teacher, rows, answers, place)

    def _answer(self, ask: Callable[[], T]) -> T:
        return ask() if self.patience is None else self.patience.answer(ask)

    def _read(self, wanted: Sequence[int]) -> tuple[list[Tokens], list[NDArray[np.bool_]], list[list[Targets]]]:
        with self.lock.get():
            rows = self.corpus.take(wanted)
            masks = self.corpus.take_loss_mask(wanted) if self.corpus.has_loss_mask else _all_taught(rows)
            return rows, masks, [source.read(wanted, rows) for source in self.sources]


def _all_taught(rows: Sequence[Tokens]) -> list[NDArray[np.bool_]]:
    return [np.ones(len(row), dtype=np.bool_) for row in rows]


def _pad_rows(
    rows: Sequence[Tokens], masks: Sequence[NDArray[np.bool_]], prefix: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    first = len(prefix)
    shape = (len(rows), first + max(len(row) for row in rows))
    tokens = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.bool_)
    labels = np.full(shape, NO_LABEL, dtype=np.int64)
    tokens[:, :first] = prefix
    for i, (row, taught) in enumerate(zip(rows, masks, strict=True)):
        stop = first + len(row)
        tokens[i, first:stop] = row
        mask[i, first:stop] = taught
        # Target t is of the token after row[t].
        labels[i, first : stop - 1] = np.where(taught[:-1], tokens[i, first + 1 : stop], NO_LABEL)
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(labels)


def _pad_targets(answers: Sequence[Targets], length: int, weight: float, first: int) -> TeacherTargets:
    k = max(targets.k for targets in answers)
    ids = np.full((len(answers), length, k), NO_ID, dtype=np.int32)
    logprobs = np.full((len(answers), length, k), -np.inf, dtype=np.float32)
    log_tail = np.full((len(answers), length), -np.inf, dtype=np.float32)
    for i, targets in enumerate(answers):
        stop = first + targets.num_positions
        ids[i, first:stop, : targets.k] = targets.ids
        logprobs[i, first:stop, : targets.k] = targets.logprobs
        log_tail[i, first:stop] = targets.log_tail
    return TeacherTargets(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(log_tail), weight)
