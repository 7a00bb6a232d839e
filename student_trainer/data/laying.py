"""Laying of rows and their targets into the tensors of a batch, one after the other, padded on the right.

Shape legend:  N rows, B rows of the tensors, T tokens of the fullest of them, K kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.cache.types import Draws, Targets, Tokens
from potstill.student_trainer.data.sources import NO_ID
from potstill.student_trainer.losses import NO_LABEL, TeacherTargets


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Places of rows in the tensors of a batch."""

    bins: NDArray[np.int64]
    """[N] row of the tensors."""
    starts: NDArray[np.int64]
    """[N] first token in it."""
    stops: NDArray[np.int64]
    """[N] one past the last."""
    filled: NDArray[np.int64]
    """[B] tokens of each row of the tensors."""
    width: int
    """Tokens T of the fullest of them, at least one."""
    gaps: list[int]
    """[N+1] places without a row's own tokens before each, and after the last, on the flat axis of B * T."""

    @classmethod
    def of(cls, sizes: Sequence[int], lengths: Sequence[int], prefix: int) -> Places:
        """Place rows of `lengths` [N] one after the other in bins of so many rows, `sizes` [B]."""
        bins = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        ends = np.cumsum(lengths, dtype=np.int64)
        before = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])]
        starts = ends - np.asarray(lengths, dtype=np.int64) - before[:-1][bins]
        stops = starts + np.asarray(lengths, np.int64)
        filled = np.diff(before) if len(sizes) else np.zeros(1, np.int64)
        width = max(int(filled.max()), 1)
        begins = np.append(bins * width + starts + prefix, len(filled) * width)
        gaps = begins - np.append(0, bins * width + stops)
        return cls(bins, starts, stops, filled, width, gaps.tolist())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the tensors, at least one each."""
        return len(self.filled), self.width

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
        return torch.tensor(np.where(np.arange(self.width) < self.filled[:, None], positions, 0))


def laid_rows(
    rows: Sequence[Tokens], taught: Sequence[NDArray[np.bool_]], prefix: Sequence[int], places: Places
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay tokens [T] of rows and which targets are learnt [T]: tokens, mask and labels [B, T] of a `Batch`."""
    tokens, mask = _laid(rows, 0, torch.int64, places), _laid(taught, 0, torch.bool, places)
    for i, start in zip(places.bins.tolist(), places.starts.tolist(), strict=True) if prefix else ():
        tokens[i, start : start + len(prefix)] = torch.tensor(prefix)
    # Target t is of the token after `row[t]`, which the last has not.
    labelled = mask.numpy().copy()
    labelled[places.bins, places.stops - 1] = False
    labels = torch.full(places.shape, NO_LABEL, dtype=torch.int64)
    np.copyto(labels.numpy()[:, :-1], tokens.numpy()[:, 1:], where=labelled[:, :-1])
    return tokens, mask, labels


def laid_targets(answers: Sequence[Targets], weight: float, prefix: int, places: Places) -> TeacherTargets:
    """Lay the targets of rows that have a prefix of so many tokens."""
    k = max((targets.k for targets in answers), default=1)
    drawn_ids, drawn_counts = _laid_draws([each.draws for each in answers], prefix, places)
    return TeacherTargets(
        _laid([each.ids for each in answers], NO_ID, torch.int32, places, k),
        _laid([each.logprobs for each in answers], -np.inf, torch.float32, places, k),
        _laid([each.log_tail for each in answers], -np.inf, torch.float32, places),
        weight,
        drawn_ids,
        drawn_counts,
        _laid_numbers([None if each.log_z is None else each.log_z[:, 0] for each in answers], places),
        _laid_numbers([each.entropy for each in answers], places),
        _laid_numbers([each.label_logprob for each in answers], places, filler=np.nan),
        _laid_alignment(answers, places),
    )


def _laid_alignment(answers: Sequence[Targets], places: Places) -> Tensor | None:
    """Alignments [B, T, 3] of rows some of which have one: the others' targets are of the student's own tokenizer."""
    if all(each.alignment is None for each in answers):
        return None
    own = [
        np.zeros((each.num_positions, 3), np.float32) if each.alignment is None else each.alignment for each in answers
    ]
    return _laid(own, 0.0, torch.float32, places, 3)


def _laid_numbers(
    answers: Sequence[NDArray[np.float32] | None], places: Places, *, filler: float = 0.0
) -> Tensor | None:
    """Numbers [B, T] of rows that all have some; else None."""
    there = [each for each in answers if each is not None]
    return _laid(there, filler, torch.float32, places) if len(there) == len(answers) else None


def _laid(answers: Sequence[NDArray[Any]], filler: float, dtype: torch.dtype, places: Places, *width: int) -> Tensor:
    """Values [B, T] or [B, T, `width`] of rows [T] or [T, at most `width`], and `filler` where there are none."""
    # Torch's own memory: to give back that of an array, whoever drops the tensor waits for Python's lock once more.
    laid = torch.empty((*places.shape, *width), dtype=dtype)
    out = laid.numpy().reshape(math.prod(places.shape), *width)
    fill = np.asarray(filler, out.dtype)
    pieces: list[NDArray[Any]] = []
    for gap, values in zip(places.gaps, [*answers, None], strict=True):
        if gap:
            pieces.append(np.full((gap, *width), fill))
        if values is not None:
            pieces.append(_widened(values, fill, *width) if width else values)
    # All rows by one call, which lets go of the lock while it copies.
    np.concatenate(pieces, out=out, casting="unsafe")
    return laid


def _widened(values: NDArray[Any], filler: NDArray[Any], width: int) -> NDArray[Any]:
    if values.shape[1] == width:
        return values
    wide = np.full((len(values), width), filler, filler.dtype)
    wide[:, : values.shape[1]] = values
    return wide


def _laid_draws(
    answers: Sequence[Draws | None], prefix: int, places: Places
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
