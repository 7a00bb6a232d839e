"""Rows and targets as padded tensors.

Reading is the same for every source, order and number of workers: row indexes go in, a `Batch` comes out.

Shape legend:  B rows, T tokens of the longest row, K kept ids, V vocabulary.
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
from potstill.cache.errors import TeacherFailed
from potstill.cache.forks import PerProcess
from potstill.cache.types import Targets, Tokens
from potstill.clients.patience import Patience
from potstill.student_trainer.data.sources import TargetSource
from potstill.student_trainer.losses import NO_LABEL, TeacherTargets

T = TypeVar("T")
_NO_ID = np.iinfo(np.int32).max
"""Pads the id axis where a row has fewer ids. It is over any vocabulary, so its mass of 0 joins the tail; a real id
would be taken out of the student's tail."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows, padded on the right."""

    tokens: Tensor
    """[B, T] int64; 0 where padded."""
    mask: Tensor
    """[B, T] bool; False where padded."""
    labels: Tensor
    """[B, T] int64: the next token; `NO_LABEL` at the last token of a row and where padded."""
    teachers: tuple[TeacherTargets, ...]
    """One per source: ids int32 [B, T, K], logprobs and log_tail float32; nothing (-inf) where padded."""

    @property
    def num_positions(self) -> int:
        """Tokens that are not padding: as many as there are targets."""
        return int(self.mask.sum())

    @property
    def num_labels(self) -> int:
        """Positions with a next token."""
        return int((self.labels != NO_LABEL).sum())

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        if device == self.tokens.device:
            return self
        teachers = tuple(teacher.each(lambda tensor: tensor.to(device)) for teacher in self.teachers)
        return Batch(self.tokens.to(device), self.mask.to(device), self.labels.to(device), teachers)


@dataclass(frozen=True, slots=True, eq=False)
class BatchReader:
    """Reads rows of a corpus with every source's targets."""

    corpus: Corpus
    sources: tuple[TargetSource, ...] = ()
    weights: tuple[float, ...] = ()
    """One per source."""
    lock: PerProcess[threading.Lock] = field(default_factory=lambda: PerProcess(threading.Lock), repr=False)
    """Training reads ahead while evaluation reads: corpus and sources see one caller at a time."""
    patience: Patience | None = field(default=None, repr=False)
    """With sources that do not answer; without one their errors are raised at once."""

    def without_targets(self) -> BatchReader:
        """A reader of the same rows that asks no source, for plain cross-entropy."""
        return replace(self, sources=(), weights=())

    def read(self, indexes: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read the rows at `indexes` as one batch, in that order.

        Raises:
            TeacherFailed: a source answers with another number of rows or positions than it was asked for.
            PotstillError: whatever a source raises.
        """
        wanted = [int(i) for i in indexes]
        rows, answers = self._answer(lambda: self._read(wanted))
        for source, targets in zip(self.sources, answers, strict=True):
            _check_lengths(source.name, rows, targets)
        tokens, mask, labels = _pad_rows(rows)
        teachers = tuple(
            _pad_targets(targets, tokens.shape[1], weight)
            for targets, weight in zip(answers, self.weights, strict=True)
        )
        return Batch(tokens, mask, labels, teachers)

    def num_positions(self, indexes: NDArray[np.int64]) -> int:
        """Count the tokens of rows; raises as `read`."""
        return int(np.diff(self._answer(lambda: self.corpus.row_ranges(indexes)), axis=1).sum())

    def _answer(self, ask: Callable[[], T]) -> T:
        return ask() if self.patience is None else self.patience.answer(ask)

    def _read(self, wanted: Sequence[int]) -> tuple[list[Tokens], list[list[Targets]]]:
        with self.lock.get():
            rows = self.corpus.take(wanted)
            return rows, [source.read(wanted, rows) for source in self.sources]


def _check_lengths(name: str, rows: Sequence[Tokens], answers: Sequence[Targets]) -> None:
    if len(answers) != len(rows):
        raise TeacherFailed(f"teacher {name!r} answered {len(answers)} rows of {len(rows)}")
    for row, targets in zip(rows, answers, strict=True):
        if targets.num_positions != len(row):
            raise TeacherFailed(f"teacher {name!r} gave {targets.num_positions} targets for a row of {len(row)} tokens")


def _pad_rows(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(rows), max(len(row) for row in rows))
    tokens = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.bool_)
    labels = np.full(shape, NO_LABEL, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
        labels[i, : len(row) - 1] = row[1:]  # target t predicts the token after row[t]
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(labels)


def _pad_targets(answers: Sequence[Targets], length: int, weight: float) -> TeacherTargets:
    k = max(targets.k for targets in answers)
    ids = np.full((len(answers), length, k), _NO_ID, dtype=np.int32)
    logprobs = np.full((len(answers), length, k), -np.inf, dtype=np.float32)
    log_tail = np.full((len(answers), length), -np.inf, dtype=np.float32)
    for i, targets in enumerate(answers):
        t = targets.num_positions
        ids[i, :t, : targets.k] = targets.ids
        logprobs[i, :t, : targets.k] = targets.logprobs
        log_tail[i, :t] = targets.log_tail
    return TeacherTargets(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(log_tail), weight)
