"""The smallest encoding of targets: blocks of positions, each coded to bytes on its own.

`archive` keeps what `u8` keeps (see `cache.encoding`) at the same error bound, coded with a range coder under models
that learn as they go and look at the corpus: `archive_ids` for ranks, `archive_numbers` for the rest. It differs from
`u8` in

    ids             order within equal gaps, where `u8` has none to give, becomes rising rank
    log_tail        rounded so that no logprob moves by more than 0.001 nat: itself at most 1/64 nat off, and exact
                    above -1 and below -32
    label_logprob   that of its entry, when the label is among the top-k (at most 1/16 + 0.001 nat off); else in steps
                    of 1/16 nat (1/32 nat off)

Draws are kept exactly. Both need the corpus again to decode (`Context`). Whatever the bytes, decoding ends with arrays
of the expected shapes or with `FormatError`, in memory that follows from the expected shapes alone.

Shape legend:  p positions of a block, K kept entries, U unique draws of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cache.archive_blocks import (
    DRAWS,
    MAX_K,
    NO_LABEL,
    TOP_K,
    Context,
    check_context,
    framed,
    links,
    unframed,
)
from cache.errors import FormatError, InvalidInput
from cache.gaps import STEP

if TYPE_CHECKING:
    from cache.archive_model import Lists
    from cache.archive_numbers import Numbers

BLOCK_POSITIONS = 16_384
"""Positions that are best coded together: twice as many are 2% smaller, half as many 2% larger."""
_LABEL_BOUND = 1 / 16
_MOST_LABEL = 65_504 * 16
# By the exponent of a float16 from 1 to 32: the bits that a rounded tail does without.
_DROPPED = {15: 1, 16: 2, 17: 3, 18: 2, 19: 1}
_INFINITE = 0x7C00


@dataclass(frozen=True, slots=True, eq=False)
class TopKCodes:
    """What `u8` stores of a block."""

    ids: NDArray[np.uint32]
    """[p, K] ranks by falling logprob."""
    gaps: NDArray[np.uint8]
    """[p, K-1]."""
    log_tail: NDArray[np.float16]
    """[p]."""
    label_logprob: NDArray[np.float16]
    """[p] NaN where there is none, or where `label_entry` says it all."""
    label_entry: NDArray[np.int16]
    """[p] the entry whose logprob is the label's, -1 where none is."""


@dataclass(frozen=True, slots=True, eq=False)
class DrawCodes:
    """Draws of a block: at each position by falling count, then by rising rank."""

    lengths: NDArray[np.uint16]
    """[p]."""
    ids: NDArray[np.uint32]
    """[U] ranks."""
    counts: NDArray[np.uint16]
    """[U]."""


def canonical(codes: TopKCodes, context: Context) -> TopKCodes:
    """What `unpack_top_k` gives of packed `codes`: `ids` in order, tails rounded, labels by entry where that is near.

    Where `codes.label_entry` is not -1 it is kept.

    Raises:
        InvalidInput: NaN or a positive number for a tail; a positive label.
    """
    log_tail = _tail_values()[_tail_indices(codes.log_tail)]
    ids = _in_order(codes)
    entry = _entries_of_labels(ids, context)
    near = _near_entry(replace(codes, log_tail=log_tail), entry)
    by_entry = (entry >= 0) & ((codes.label_entry >= 0) | near)
    steps = _label_steps(np.where(by_entry, np.float16(np.nan), codes.label_logprob).astype(np.float16))
    return TopKCodes(
        ids=ids,
        gaps=codes.gaps,
        log_tail=log_tail,
        label_logprob=_label_values(steps),
        label_entry=np.where(by_entry, entry, -1).astype(np.int16),
    )


def pack_top_k(codes: TopKCodes, context: Context, vocab_size: int) -> bytes:
    """The bytes of one block.

    Raises:
        InvalidInput: shapes that do not fit, a rank over the vocabulary or twice at a position, K over `MAX_K`, or as
            `canonical`.
    """
    from cache import archive_ids, archive_model, archive_numbers, entropy_coder  # noqa: PLC0415 -- numba takes a second to import

    positions, k = codes.ids.shape
    check_context(context, positions, vocab_size)
    _check_ranks(codes.ids, vocab_size, k)
    if codes.gaps.shape != (positions, k - 1):
        raise InvalidInput(f"gaps are {codes.gaps.shape}, {(positions, k - 1)} fit ids of {codes.ids.shape}")
    codes = canonical(codes, context)
    coder = entropy_coder.writer(positions * (3 * k + 16) + 64)
    numbers = _numbers(codes)
    model = archive_numbers.new_number_model(k)
    archive_numbers.code_gaps(coder, numbers, model)
    archive_numbers.code_tails(coder, numbers, model, len(_tail_values()) - 1)
    lists = _top_k_lists(codes.ids.reshape(-1).astype(np.uint32), codes.gaps)
    archive_ids.code_lists(coder, lists, links(context), archive_model.new_model(vocab_size, positions, k))
    contexts = _label_contexts(codes.ids, context)
    archive_numbers.code_labels(coder, numbers, model, contexts, _MOST_LABEL)
    return framed(TOP_K, positions, k, vocab_size, context, entropy_coder.finish(coder))


def unpack_top_k(data: bytes, context: Context, k: int, vocab_size: int) -> TopKCodes:
    """The codes of one block, as `canonical` gives them.

    Raises:
        FormatError: bytes that no block of these positions, k and vocabulary packs to, or another context.
        InvalidInput: a context that is out of the vocabulary.
    """
    from cache import archive_ids, archive_model, archive_numbers, entropy_coder  # noqa: PLC0415 -- as in pack_top_k

    positions = len(context.tokens)
    check_context(context, positions, vocab_size)
    words = unframed(data, TOP_K, positions, k, vocab_size, context)
    coder = entropy_coder.reader(words)
    numbers = archive_numbers.Numbers(
        gaps=np.zeros((positions, k - 1), dtype=np.uint8),
        tails=np.zeros(positions, dtype=np.int32),
        label_kinds=np.zeros(positions, dtype=np.uint8),
        labels=np.zeros(positions, dtype=np.int32),
    )
    model = archive_numbers.new_number_model(k)
    archive_numbers.code_gaps(coder, numbers, model)
    archive_numbers.code_tails(coder, numbers, model, len(_tail_values()) - 1)
    _check_stream(coder.state)
    lists = _top_k_lists(np.zeros(positions * k, dtype=np.uint32), numbers.gaps)
    archive_ids.code_lists(coder, lists, links(context), archive_model.new_model(vocab_size, positions, k))
    _check_stream(coder.state)
    ids = lists.ids.reshape(positions, k)
    archive_numbers.code_labels(coder, numbers, model, _label_contexts(ids, context), _MOST_LABEL)
    _check_stream(coder.state, len(words))
    return _top_k_codes(ids, numbers, context)


def pack_draws(codes: DrawCodes, context: Context, draws: int, vocab_size: int) -> bytes:
    """The bytes of one block of `draws` draws at each position; ranks may come in any order within a position.

    Raises:
        InvalidInput: counts that do not sum to `draws`, a rank over the vocabulary or twice at a position, or more than
            `MAX_K` draws.
    """
    from cache import archive_ids, archive_model, archive_numbers, entropy_coder  # noqa: PLC0415 -- as in pack_top_k

    positions = len(codes.lengths)
    check_context(context, positions, vocab_size)
    codes = canonical_draws(codes)
    _check_draws(codes, draws, vocab_size)
    coder = entropy_coder.writer(len(codes.ids) * 5 + positions + 64)
    archive_numbers.code_counts(coder, codes.lengths, codes.counts, archive_numbers.new_count_model(), draws)
    model = archive_model.new_model(vocab_size, positions, draws)
    archive_ids.code_lists(coder, _draw_lists(codes, draws), links(context), model)
    return framed(DRAWS, positions, draws, vocab_size, context, entropy_coder.finish(coder))


def unpack_draws(data: bytes, context: Context, draws: int, vocab_size: int) -> DrawCodes:
    """The draws of one block, as `canonical_draws` gives them.

    Raises:
        FormatError: bytes that no block of these positions, draws and vocabulary packs to, or another context.
        InvalidInput: a context that is out of the vocabulary.
    """
    from cache import archive_ids, archive_model, archive_numbers, entropy_coder  # noqa: PLC0415 -- as in pack_top_k

    positions = len(context.tokens)
    check_context(context, positions, vocab_size)
    words = unframed(data, DRAWS, positions, draws, vocab_size, context)
    coder = entropy_coder.reader(words)
    lengths = np.zeros(positions, dtype=np.uint16)
    counts = np.zeros(positions * draws, dtype=np.uint16)
    used = archive_numbers.code_counts(coder, lengths, counts, archive_numbers.new_count_model(), draws)
    _check_stream(coder.state)
    codes = DrawCodes(lengths, np.zeros(used, dtype=np.uint32), counts[:used].copy())
    model = archive_model.new_model(vocab_size, positions, draws)
    archive_ids.code_lists(coder, _draw_lists(codes, draws), links(context), model)
    _check_stream(coder.state, len(words))
    return codes


def canonical_draws(codes: DrawCodes) -> DrawCodes:
    """The same draws, at each position by falling count, then by rising rank."""
    position = np.repeat(np.arange(len(codes.lengths)), codes.lengths)
    order = np.lexsort((codes.ids, -codes.counts.astype(np.int64), position))
    return replace(codes, ids=codes.ids[order], counts=codes.counts[order])


def _in_order(codes: TopKCodes) -> NDArray[np.uint32]:
    """[p, K] ids, rising where the gap is zero."""
    positions, k = codes.ids.shape
    group = np.zeros((positions, k), dtype=np.uint64)
    np.cumsum(codes.gaps > 0, axis=1, out=group[:, 1:])
    keys = group << np.uint64(32) | codes.ids
    keys.sort(axis=1)
    return keys.astype(np.uint32)


def _entries_of_labels(ids: NDArray[np.uint32], context: Context) -> NDArray[np.int64]:
    """[p] the entry that is the label, -1 where none is."""
    found = ids == context.labels[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1), -1)


def _near_entry(codes: TopKCodes, entry: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[p] whether the label's logprob is within the bound of that entry's decoded one."""
    depth = np.zeros(codes.ids.shape, dtype=np.int64)
    np.cumsum(codes.gaps, axis=1, out=depth[:, 1:])
    label = codes.label_logprob.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.log(-np.expm1(np.minimum(codes.log_tail.astype(np.float64), 0.0)))
        top = kept - np.log(np.exp(-STEP * depth).sum(axis=1))
        decoded = top - STEP * np.take_along_axis(depth, np.maximum(entry, 0)[:, None], axis=1)[:, 0]
        # A float16 label is itself off by up to one part in 2048.
        near: NDArray[np.bool_] = np.abs(label - decoded) <= _LABEL_BOUND + np.abs(label) / 2048 + 0.001
    return near


@cache
def _tail_grid() -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """The index of every float16 bit pattern from 0 to infinity, sign left out, and the value of every index."""
    pattern = np.arange(_INFINITE + 1)
    rounded = pattern.copy()
    for exponent, bits in _DROPPED.items():
        here = pattern >> 10 == exponent
        rounded[here] = (pattern[here] + (1 << bits >> 1)) >> bits << bits
    patterns, index = np.unique(rounded, return_inverse=True)
    return index.astype(np.int32), -patterns.astype(np.uint16).view(np.float16)


def _tail_indices(log_tail: NDArray[np.float16]) -> NDArray[np.int32]:
    if not (log_tail <= 0).all():
        wrong = log_tail[~(log_tail <= 0)][0]
        raise InvalidInput(f"a log tail is {wrong}; logarithms of a mass are zero or below")
    indices: NDArray[np.int32] = _tail_grid()[0][log_tail.view(np.uint16) & np.uint16(0x7FFF)]
    return indices


def _tail_values() -> NDArray[np.float16]:
    return _tail_grid()[1]


def _label_steps(label_logprob: NDArray[np.float16]) -> NDArray[np.int64]:
    """[p] labels in 1/16 nat below zero; -1 for NaN, -2 for -inf."""
    if (label_logprob > 0).any():
        raise InvalidInput(f"a label's logprob is {label_logprob[label_logprob > 0][0]}; it must be zero or below")
    known = np.isfinite(label_logprob)
    steps = np.rint(np.where(known, -label_logprob.astype(np.float64), 0.0) / STEP).astype(np.int64)
    return np.where(known, steps, np.where(np.isnan(label_logprob), -1, -2))


def _label_values(steps: NDArray[np.int64]) -> NDArray[np.float16]:
    values = (-STEP * steps).astype(np.float16)
    return np.where(steps >= 0, values, np.where(steps == -1, np.nan, -np.inf)).astype(np.float16)


def _numbers(codes: TopKCodes) -> Numbers:
    from cache import archive_numbers as numbers  # noqa: PLC0415 -- as in pack_top_k

    steps = _label_steps(codes.label_logprob)
    kinds = np.select(
        [codes.label_entry >= 0, steps >= 0, steps == -2],
        [numbers.LABEL_IS_ENTRY, numbers.LABEL_APART, numbers.LABEL_WITHOUT_MASS],
        numbers.NO_LABEL,
    )
    return numbers.Numbers(
        gaps=np.ascontiguousarray(codes.gaps).copy(),
        tails=_tail_indices(codes.log_tail),
        label_kinds=kinds.astype(np.uint8),
        labels=np.maximum(steps, 0).astype(np.int32),
    )


def _top_k_codes(ids: NDArray[np.uint32], numbers: Numbers, context: Context) -> TopKCodes:
    from cache import archive_numbers  # noqa: PLC0415 -- as in pack_top_k

    kinds = numbers.label_kinds
    entry = _entries_of_labels(ids, context)
    if ((kinds == archive_numbers.LABEL_IS_ENTRY) & (entry < 0)).any():
        raise FormatError("an archive block takes a label for an entry that is not there")
    apart = np.where(kinds == archive_numbers.LABEL_WITHOUT_MASS, -2, -1)
    steps = np.where(kinds == archive_numbers.LABEL_APART, numbers.labels, apart)
    return TopKCodes(
        ids=ids,
        gaps=numbers.gaps,
        log_tail=_tail_values()[numbers.tails],
        label_logprob=_label_values(steps),
        label_entry=np.where(kinds == archive_numbers.LABEL_IS_ENTRY, entry, -1).astype(np.int16),
    )


def _label_contexts(ids: NDArray[np.uint32], context: Context) -> NDArray[np.uint8]:
    """[p] 0 at a row's end, 1 where the label is an entry, 2 elsewhere."""
    contexts = np.where(_entries_of_labels(ids, context) >= 0, 1, 2)
    return np.where(context.labels == NO_LABEL, 0, contexts).astype(np.uint8)


def _top_k_lists(ids: NDArray[np.uint32], gaps: NDArray[np.uint8]) -> Lists:
    from cache.archive_model import CELLS, CLASSES, RATIOS, Lists  # noqa: PLC0415 -- as in pack_top_k

    positions, k = gaps.shape[0], gaps.shape[1] + 1
    tied = np.zeros((positions, k), dtype=np.uint8)
    tied[:, 1:] = gaps == 0
    column = np.arange(k)
    classes = CLASSES - 2 - np.arange(RATIOS) * (CLASSES - 1) // RATIOS
    return Lists(
        starts=np.arange(positions + 1, dtype=np.int64) * k,
        ids=ids,
        votes=np.tile((3 * k - 2 * column).astype(np.int32), positions),
        max_vote=3 * k,
        cells=np.tile((column * CELLS // k).astype(np.uint8), positions),
        tied=tied.reshape(-1),
        # The first ids of a list are rarely deep in another.
        depths=np.array([8, 20, k], dtype=np.int64),
        classes=classes.astype(np.uint8),
    )


def _draw_lists(codes: DrawCodes, draws: int) -> Lists:
    from cache.archive_model import CLASSES, RATIOS, Lists  # noqa: PLC0415 -- as in pack_top_k

    starts = np.concatenate([[0], np.cumsum(codes.lengths, dtype=np.int64)])
    counts = codes.counts.astype(np.int64)
    tied = np.zeros(len(counts), dtype=np.uint8)
    tied[1:] = counts[1:] == counts[:-1]
    tied[starts[:-1][codes.lengths > 0]] = 0
    # A share of the votes falls by half in two classes.
    edges = [RATIOS * 2 ** (-(c + 1) // 2) * (3 if c % 2 else 4) // 4 for c in range(CLASSES - 2)]
    classes = np.searchsorted(-np.array(edges), -np.arange(RATIOS), side="right")
    return Lists(
        starts=starts,
        ids=codes.ids,
        votes=np.minimum(counts, 8).astype(np.int32),
        max_vote=8,
        cells=np.searchsorted([2, 3, 4, 6, 10, 20], counts, side="right").astype(np.uint8),
        tied=tied,
        depths=np.full(3, draws, dtype=np.int64),
        classes=np.minimum(classes, CLASSES - 2).astype(np.uint8),
    )


def _check_stream(state: NDArray[np.int64], end: int | None = None) -> None:
    if state[1] or (end is not None and state[0] != end):
        raise FormatError("an archive block is damaged: its bytes do not decode")


def _check_ranks(ids: NDArray[np.uint32], vocab_size: int, k: int) -> None:
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"archive keeps 1 to {MAX_K} entries of a position, not {k}")
    if int(ids.max(initial=0)) >= vocab_size:
        raise InvalidInput(f"a rank is {int(ids.max())}, the vocabulary has {vocab_size}")
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise InvalidInput("a position has the same id twice; archive keeps each once")


def _check_draws(codes: DrawCodes, draws: int, vocab_size: int) -> None:
    if not 1 <= draws <= MAX_K:
        raise InvalidInput(f"archive keeps 1 to {MAX_K} draws of a position, not {draws}")
    if int(codes.ids.max(initial=0)) >= vocab_size:
        raise InvalidInput(f"a rank is {int(codes.ids.max())}, the vocabulary has {vocab_size}")
    position = np.repeat(np.arange(len(codes.lengths)), codes.lengths)
    sums = np.bincount(position, weights=codes.counts, minlength=len(codes.lengths))
    if (sums != draws).any() or (codes.counts == 0).any():
        raise InvalidInput(f"counts of a position must be positive and sum to {draws}, its draws")
    keys = np.sort(position << 32 | codes.ids.astype(np.int64))
    if (keys[1:] == keys[:-1]).any():
        raise InvalidInput("a position has the same id twice among its draws; its counts must be added up")
