"""The self-check of a private capture path against vLLM's public one, on a few tokens of the running engine.

Fields that only the private path gives are compared with plain float64 maths on its own full distributions; these are
compared with the public path's largest entries, and must sum to 1. Plain numpy.

Shape legend:  T tokens of the row, K kept entries, V vocabulary size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.draws import draw_rows
from potstill.cache.types import Draws, Fields, Targets, Tokens

MAX_PUBLIC_K = 2048
"""Entries per position that the public path is asked for, or the whole vocabulary where that is smaller."""
_TOLERANCE = 1e-4
"""Largest difference in nats: the same float32 distribution may be summed in two orders."""
_MOVED_DRAWS = 0.02
"""Share of draws that may fall on a neighbouring id, because they lie at the edge between two."""


def checked_row(vocab_size: int, max_tokens: int) -> list[int]:
    """The row of token ids to check with, low and high ones."""
    return [token % vocab_size for token in (0, 1, 2, 3, vocab_size - 1, vocab_size // 2, 5, 7)][:max_tokens]


def checked_fields(vocab_size: int, max_top_k: int, *, every_field: bool) -> Fields:
    """The fields to ask a private path for."""
    k = min(64, max_top_k, vocab_size)
    if not every_field:
        return Fields(k=k)
    return Fields(k=k, draws=50, seed=1, entropy=True, temperatures=(0.5, 2.0), dense=True)


def disagreement(private: Targets, public: Targets, want: Fields, row: Tokens) -> str:
    """The first difference between two answers for one row, in one line; empty where they agree.

    Args:
        private: targets with the fields `want`.
        public: the top-k of the same positions, with more entries.
        want: the fields that the private path was asked for.
        row: [T] token ids.
    """
    found = _top_k_disagreement(private, public)
    if found or want.only_top_k:
        return found
    assert private.dense is not None, "checked_fields asks for it"
    dense = private.dense.astype(np.float64)
    if not _close(np.exp(dense).sum(axis=1), 1.0):
        return "the full distributions do not sum to 1"
    if not _close(np.take_along_axis(dense, public.ids.astype(np.int64), axis=1), public.logprobs):
        return "the full distributions are not the public path's"
    return _extras_disagreement(private, dense, want, row)


def _top_k_disagreement(private: Targets, public: Targets) -> str:
    k = private.k
    if private.num_positions != public.num_positions:
        return f"{private.num_positions} targets instead of {public.num_positions}"
    if not _close(private.logprobs, public.logprobs[:, :k]):
        return f"the top-{k} logprobs differ from the public path's"
    if not _close(private.logprobs, _looked_up(public, private.ids)):
        return f"the top-{k} ids differ from the public path's"
    # The last position has no label.
    if not _close(private.label_logprob[:-1], public.label_logprob[:-1]):
        return "the labels' logprobs differ from the public path's"
    return ""


def _extras_disagreement(private: Targets, dense: NDArray[np.float64], want: Fields, row: Tokens) -> str:
    assert private.entropy is not None, "checked_fields asks for it"
    assert private.log_z is not None, "checked_fields asks for it"
    assert private.draws is not None, "checked_fields asks for it"
    # 0 * -inf of a masked id would be a NaN; it counts as 0.
    masked = np.where(np.isneginf(dense), 0.0, dense)
    if not _close(private.entropy, -(np.exp(dense) * masked).sum(axis=1)):
        return "the entropy is not that of the full distributions"
    tempered = np.stack([np.logaddexp.reduce(dense / t, axis=1) for t in want.temperatures], axis=1)
    if not _close(private.log_z, tempered):
        return "log_z is not that of the full distributions"
    theirs = draw_rows(dense, want.draws, want.seed, row.tobytes())
    moved = _moved(private.draws, theirs, dense.shape[1])
    # Two draws are allowed in any case, as the share of a short row rounds to less than one.
    if moved > max(2.0, _MOVED_DRAWS * want.draws * len(row)):
        return f"{moved} of {want.draws * len(row)} draws are not those of the full distributions"
    return ""


def _looked_up(public: Targets, ids: NDArray[np.uint32]) -> NDArray[np.float32]:
    """[T, K] the public path's logprobs of `ids`."""
    # An id that the public path does not have may be tied with its last one, whose logprob it gets.
    dense = np.repeat(public.logprobs[:, -1:], int(max(public.ids.max(), ids.max())) + 1, axis=1)
    np.put_along_axis(dense, public.ids.astype(np.int64), public.logprobs, axis=1)
    return np.take_along_axis(dense, ids.astype(np.int64), axis=1)


def _moved(ours: Draws, theirs: Draws, vocab_size: int) -> int:
    """Number of draws that fell on another id."""
    counts = np.zeros((len(ours.offsets) - 1) * vocab_size, np.int64)
    for draws, sign in ((ours, 1), (theirs, -1)):
        position = np.repeat(np.arange(len(draws.offsets) - 1), np.diff(draws.offsets))
        np.add.at(counts, position * vocab_size + draws.ids, sign * draws.counts.astype(np.int64))
    return int(np.abs(counts).sum()) // 2


def _close(ours: NDArray[np.floating], theirs: NDArray[np.floating] | float) -> bool:
    return bool(np.allclose(ours, theirs, rtol=1e-5, atol=_TOLERANCE))
