"""The codec of `archive`, the smallest encoding of targets: blocks of positions, each coded to bytes on its own.

`archive` keeps what `u8` keeps (see `encoding.logprobs`) at the same error bound, coded with a range coder under models
that learn as they go and look at the corpus: `archive.ids` for ranks, `archive.numbers` for the rest. It differs from
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

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive import ids as ids_coder, numbers as numbers_coder, range_coder
from potstill.cache.encoding.archive.blocks import (
    DRAWS,
    NO_LABEL,
    TOP_K,
    Context,
    check_context,
    framed,
    links,
    unframed,
)
from potstill.cache.encoding.archive.codes import (
    MOST_LABEL,
    DrawCodes,
    TopKCodes,
    canonical,
    canonical_draws,
    check_draws,
    check_ranks,
    entries_of_labels,
    label_steps,
    label_values,
    tail_indices,
    tail_values,
)
from potstill.cache.encoding.archive.model import CELLS, CLASSES, RATIOS, Lists, new_model
from potstill.cache.encoding.archive.numbers import Numbers
from potstill.cache.encoding.archive.range_coder import FAILED, PLACE, Coder
from potstill.cache.errors import FormatError, InvalidInput


def pack_top_k(codes: TopKCodes, context: Context, vocab_size: int) -> bytes:
    """Pack the top-k of one block to bytes.

    Raises:
        InvalidInput: shapes do not fit, a rank is over the vocabulary or twice at a position, K is over `MAX_K`, or as
            `canonical`.
    """
    positions, k = codes.ids.shape
    check_context(context, positions, vocab_size)
    check_ranks(codes.ids, vocab_size, k)
    if codes.gaps.shape != (positions, k - 1):
        raise InvalidInput(f"gaps are {codes.gaps.shape}, {(positions, k - 1)} fit ids of {codes.ids.shape}")
    codes = canonical(codes, context)
    coder = range_coder.writer(positions * (3 * k + 16) + 64)
    _code_top_k(coder, codes.ids.astype(np.uint32), _numbers(codes), context, vocab_size)
    return framed(TOP_K, positions, k, vocab_size, context, range_coder.finish(coder))


def unpack_top_k(data: bytes, context: Context, k: int, vocab_size: int) -> TopKCodes:
    """Unpack the top-k of one block, as `canonical` gives it.

    Raises:
        FormatError: no block with this context, k and vocabulary packs to these bytes.
        InvalidInput: the context has a rank over the vocabulary.
    """
    positions = len(context.tokens)
    check_context(context, positions, vocab_size)
    words = unframed(data, TOP_K, positions, k, vocab_size, context)
    coder = range_coder.reader(words)
    ids = np.zeros((positions, k), dtype=np.uint32)
    numbers = Numbers(
        gaps=np.zeros((positions, k - 1), dtype=np.uint8),
        tails=np.zeros(positions, dtype=np.int32),
        label_kinds=np.zeros(positions, dtype=np.uint8),
        labels=np.zeros(positions, dtype=np.int32),
    )
    _code_top_k(coder, ids, numbers, context, vocab_size)
    _check_stream(coder, len(words))
    return _top_k_codes(ids, numbers, context)


def _code_top_k(coder: Coder, ids: NDArray[np.uint32], numbers: Numbers, context: Context, vocab_size: int) -> None:
    """Write ids [p, K] and numbers to the coder's stream, or fill them from it."""
    positions, k = ids.shape
    model = numbers_coder.new_number_model(k)
    numbers_coder.code_gaps(coder, numbers, model)
    numbers_coder.code_tails(coder, numbers, model, len(tail_values()) - 1)
    _check_stream(coder)
    # Ids after the gaps, which tell the decoder which of them are tied; labels after the ids, among which they may be.
    lists = _top_k_lists(ids.reshape(-1), numbers.gaps)
    ids_coder.code_lists(coder, lists, links(context), new_model(vocab_size, positions, k))
    _check_stream(coder)
    numbers_coder.code_labels(coder, numbers, model, _label_contexts(ids, context), MOST_LABEL)


def pack_draws(codes: DrawCodes, context: Context, draws: int, vocab_size: int) -> bytes:
    """Pack one block of `draws` draws at each position to bytes; within a position ranks may have any order.

    Raises:
        InvalidInput: counts do not sum to `draws`, a rank is over the vocabulary or twice at a position, or there are
            more than `MAX_K` draws.
    """
    positions = len(codes.lengths)
    check_context(context, positions, vocab_size)
    codes = canonical_draws(codes)
    check_draws(codes, draws, vocab_size)
    coder = range_coder.writer(len(codes.ids) * 5 + positions + 64)
    numbers_coder.code_counts(coder, codes.lengths, codes.counts, numbers_coder.new_count_model(), draws)
    model = new_model(vocab_size, positions, draws)
    ids_coder.code_lists(coder, _draw_lists(codes, draws), links(context), model)
    return framed(DRAWS, positions, draws, vocab_size, context, range_coder.finish(coder))


def unpack_draws(data: bytes, context: Context, draws: int, vocab_size: int) -> DrawCodes:
    """Unpack the draws of one block, as `canonical_draws` gives them.

    Raises:
        FormatError: no block with this context, draws and vocabulary packs to these bytes.
        InvalidInput: the context has a rank over the vocabulary.
    """
    positions = len(context.tokens)
    check_context(context, positions, vocab_size)
    words = unframed(data, DRAWS, positions, draws, vocab_size, context)
    coder = range_coder.reader(words)
    lengths = np.zeros(positions, dtype=np.uint16)
    counts = np.zeros(positions * draws, dtype=np.uint16)
    used = numbers_coder.code_counts(coder, lengths, counts, numbers_coder.new_count_model(), draws)
    _check_stream(coder)
    codes = DrawCodes(lengths, np.zeros(used, dtype=np.uint32), counts[:used].copy())
    model = new_model(vocab_size, positions, draws)
    ids_coder.code_lists(coder, _draw_lists(codes, draws), links(context), model)
    _check_stream(coder, len(words))
    return codes


def _numbers(codes: TopKCodes) -> Numbers:
    steps = label_steps(codes.label_logprob)
    kinds = np.select(
        [codes.label_entry >= 0, steps >= 0, steps == -2],
        [numbers_coder.LABEL_IS_ENTRY, numbers_coder.LABEL_APART, numbers_coder.LABEL_WITHOUT_MASS],
        numbers_coder.NO_LABEL,
    )
    return Numbers(
        gaps=np.ascontiguousarray(codes.gaps).copy(),
        tails=tail_indices(codes.log_tail),
        label_kinds=kinds.astype(np.uint8),
        labels=np.maximum(steps, 0).astype(np.int32),
    )


def _top_k_codes(ids: NDArray[np.uint32], numbers: Numbers, context: Context) -> TopKCodes:
    kinds = numbers.label_kinds
    entry = entries_of_labels(ids, context)
    if ((kinds == numbers_coder.LABEL_IS_ENTRY) & (entry < 0)).any():
        raise FormatError("an archive block takes a label for an entry that is not there")
    apart = np.where(kinds == numbers_coder.LABEL_WITHOUT_MASS, -2, -1)
    steps = np.where(kinds == numbers_coder.LABEL_APART, numbers.labels, apart)
    return TopKCodes(
        ids=ids,
        gaps=numbers.gaps,
        log_tail=tail_values()[numbers.tails],
        label_logprob=label_values(steps),
        label_entry=np.where(kinds == numbers_coder.LABEL_IS_ENTRY, entry, -1).astype(np.int16),
    )


def _label_contexts(ids: NDArray[np.uint32], context: Context) -> NDArray[np.uint8]:
    """Context [p] of each label: 0 at a row's end, 1 where it is an entry, 2 elsewhere."""
    contexts = np.where(entries_of_labels(ids, context) >= 0, 1, 2)
    return np.where(context.labels == NO_LABEL, 0, contexts).astype(np.uint8)


def _top_k_lists(ids: NDArray[np.uint32], gaps: NDArray[np.uint8]) -> Lists:
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
        # The first ids of a list are rarely deep in another: fewer votes are faster and sharper.
        depths=np.array([8, 20, k], dtype=np.int64),
        classes=classes.astype(np.uint8),
    )


def _draw_lists(codes: DrawCodes, draws: int) -> Lists:
    starts = np.concatenate([[0], np.cumsum(codes.lengths, dtype=np.int64)])
    counts = codes.counts.astype(np.int64)
    tied = np.zeros(len(counts), dtype=np.uint8)
    tied[1:] = counts[1:] == counts[:-1]
    tied[starts[:-1][codes.lengths > 0]] = 0
    # Two classes for each halving of the share of votes.
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


def _check_stream(coder: Coder, end: int | None = None) -> None:
    if coder.decoding and (coder.state[FAILED] or (end is not None and coder.state[PLACE] != end)):
        raise FormatError("an archive block is damaged: its bytes do not decode")
