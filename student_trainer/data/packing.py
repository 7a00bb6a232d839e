"""Rows of a step packed into full rows of micro-batches, planned from their lengths alone.

Every worker plans for all of them, so that all have the same number of micro-batches without a word: one that had
fewer would leave the others waiting (FSDP gathers weights in every forward pass). The losses are sums over the counts
of the global batch, so that packing changes a gradient by rounding only.

Rows that share one are kept apart by position ids that begin again at 0, which `transformers` makes an attention mask
of. Whether a student does is tried on a few tokens (`keeps_rows_apart`). Rows of one that does not (state-space
models, flash attention) get a row each, and micro-batches rows of similar length.

Shape legend:  N rows of the step, B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from heapq import heapreplace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

T = TypeVar("T")
Bin = list[int]
"""Places, among the rows that were planned for, of those that share one row."""
_Filled = tuple[int, Bin]
"""A bin, and its tokens before it."""

_WIDER = tuple(1 + i / 64 for i in range(9))
"""Widths to try, in longest rows: a little room lets far fewer rows be left over. An eighth is all it may cost."""
_ENOUGH = 1.005
"""Tokens with their padding, for each token, under which no better way is looked for."""
_SAME = 1e-4
"""Most that logits may change by being packed, of the largest one: float32 rounding is a hundredth of it."""


def plan_micro_batches(
    lengths: Sequence[NDArray[np.int64]], micro_batch_rows: int, row_tokens: int, *, pack: bool
) -> list[list[Sequence[Bin]]]:
    """Plan the micro-batches of every worker, as many for each.

    Args:
        lengths: tokens of each row, per worker [N].
        micro_batch_rows: most rows of a micro-batch, of about `row_tokens` tokens.
        row_tokens: tokens of the longest row there is.
        pack: whether rows may share one.

    Returns:
        For each worker its micro-batches: bins, of which some have none where there are more micro-batches than bins.
    """
    bins = [_fullest(each, micro_batch_rows, row_tokens) if pack else _alone(each) for each in lengths]
    count = max(-(-len(each) // micro_batch_rows) for each in bins)
    return [_cut(each, count) for each in bins]


def num_slots(micro_batches: Sequence[Sequence[Bin]], lengths: NDArray[np.int64]) -> int:
    """Count the tokens of micro-batches, padding among them: their rows are as long as the longest."""
    return sum(len(bins) * max(int(lengths[each].sum()) for each in bins) for bins in micro_batches if bins)


def keeps_rows_apart(model: nn.Module) -> bool:
    """Try if a causal language model gives rows that share one by their position ids what it gives each alone.

    Draws no random numbers. False also where a row would not show what it sees of another.
    """
    config, device = getattr(model, "config", None), next(model.parameters()).device
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return False  # chunks are counted from the beginning of the tensors, further on than is tried
    if (getattr(config, "max_position_embeddings", None) or 8) < 8:
        return False  # the two rows without position ids would leave its table of positions
    first, second, third = (torch.arange(start, start + 4, device=device)[None] % 7 for start in (1, 2, 4))
    packed = torch.cat([torch.cat([first, second], dim=1), torch.cat([second, third], dim=1)])
    positions = torch.arange(4, device=device).repeat(2, 2)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([_logits(model, row) for row in (first, second, third)])
            apart, mixed = _logits(model, packed, positions), _logits(model, packed)
    finally:
        model.train(training)
    expected = torch.stack([torch.cat([alone[0], alone[1]]), torch.cat([alone[1], alone[2]])])
    off, seen = (float((found - expected).abs().max()) for found in (apart, mixed))
    return off <= _SAME * float(expected.abs().max()) and off < 0.1 * seen


def _logits(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    where = {} if positions is None else {"position_ids": positions}
    logits: Tensor = model(input_ids=tokens, use_cache=False, **where).logits
    return logits.double()


def _alone(lengths: NDArray[np.int64]) -> list[Bin]:
    """Give each row a bin, longest first."""
    return [[i] for i in np.argsort(-lengths, kind="stable").tolist()]


def _fullest(lengths: NDArray[np.int64], micro_batch_rows: int, row_tokens: int) -> list[Bin]:
    """Pack rows into bins of a width that leaves the least padding, fullest first."""
    longest_first = [(int(lengths[i]), i) for i in np.argsort(-lengths, kind="stable").tolist()]
    best, least = _alone(lengths), int(_ENOUGH * lengths.sum())
    fewest = num_slots(_parts(best, micro_batch_rows), lengths)
    for bins in _ways(longest_first, row_tokens) if fewest > least else ():
        slots = sum(len(part) * part[0][0] for part in _parts(bins, micro_batch_rows))
        if slots < fewest:
            best, fewest = [rows for _, rows in bins], slots
        if fewest <= least:
            break
    return best


def _ways(longest_first: Sequence[tuple[int, int]], row_tokens: int) -> Iterator[list[_Filled]]:
    """Pack rows in one way after the other, in bins of at most an eighth more than the longest row."""
    fitted: list[list[_Filled]] = []
    for wider in _WIDER:
        fitted.append(_best_fit(longest_first, int(row_tokens * wider)))
        yield fitted[-1]
    for count in range(max(1, len(fitted[-1]) - 1), len(fitted[0]) + 1):
        bins = _evened(longest_first, count)
        if bins[0][0] <= int(row_tokens * _WIDER[-1]):
            yield bins


def _best_fit(longest_first: Sequence[tuple[int, int]], width: int) -> list[_Filled]:
    """Put each row into the fullest bin with room; returns tokens and rows of bins, fullest first."""
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # what each bin has left, rising, and its number
    for length, i in longest_first:
        at = bisect_left(room, (length, -1))
        left, number = room.pop(at) if at < len(room) else (width, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        insort(room, (left - length, number))
    return [(width - left, bins[number]) for left, number in room]


def _evened(longest_first: Sequence[tuple[int, int]], count: int) -> list[_Filled]:
    """Put each row into the emptiest of `count` bins; returns tokens and rows of bins, fullest first."""
    bins: list[Bin] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for length, i in longest_first:
        filled, number = heap[0]
        heapreplace(heap, (filled + length, number))
        bins[number].append(i)
    return sorted(((filled, bins[number]) for filled, number in heap), key=lambda each: -each[0])


def _parts(bins: Sequence[T], micro_batch_rows: int) -> list[Sequence[T]]:
    return _cut(bins, -(-len(bins) // micro_batch_rows))


def _cut(bins: Sequence[T], count: int) -> list[Sequence[T]]:
    """Cut bins into so many parts of nearly equal size, of which there are empty ones where bins are fewer."""
    ends = [len(bins) * i // count for i in range(count + 1)]
    return [bins[start:stop] for start, stop in pairwise(ends)]
