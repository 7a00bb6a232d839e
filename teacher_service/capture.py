"""From vLLM's flat logprobs to `Targets`. The position convention is decided here, once.

vLLM's `prompt_logprobs` has one position per prompt token: position *i* scores token *i* given the
tokens before it, so position 0 is empty. Each further position is `K + 1` entries: column 0 is the
token that really stands there, columns 1..K are the top-K by falling logprob. Columns 1..K may hold
the token of column 0 once more; nothing is deduplicated.

Target *t* of a row is the distribution of the token **after** `row[t]`. A row of T tokens therefore
takes targets 0..T-2 from prompt positions 1..T-1, their labels from column 0, and target T-1 from
the one sampled token's logprobs, whose column 0 is what was sampled and is not used: the last target
has no label. With n prefix tokens in front, the engine sees prefix + row and the first n targets are
dropped.

Pure functions on numbers: no engine is needed to call or to test them.

Shapes: P = prefix + row tokens, T = row tokens, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.errors import TeacherFailed
from cache.types import Targets

TAIL_FLOOR = 1e-6
"""Tail mass under this is stored as none: float32 logprobs of a peaked row cannot resolve less, and
their sum may even pass 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatEntries:
    """Ids and logprobs of some positions, flat as vLLM hands them over: `K + 1` entries a position."""

    ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Columns:
    first_ids: NDArray[np.int64]
    """[n] column 0."""
    first_logprobs: NDArray[np.float32]
    """[n] column 0, nats."""
    ids: NDArray[np.int64]
    """[n, K] columns 1..K."""
    logprobs: NDArray[np.float32]
    """[n, K] nats."""


def targets_from_flat(
    prompt: FlatEntries,
    sampled: FlatEntries,
    *,
    tokens: Sequence[int],
    num_prefix: int,
    k: int,
    vocab_size: int,
) -> Targets:
    """The targets of one row.

    Args:
        prompt: entries of prompt positions 1..P-1, empty when P is 1.
        sampled: entries of the one sampled token.
        tokens: [P] prefix and row, as the engine saw them.
        num_prefix: how many of `tokens` are the prefix.
        k: kept entries K, at most `vocab_size`.
        vocab_size: V; with K = V nothing is outside the top-k.

    Returns:
        T = P - `num_prefix` targets: `ids` uint32 [T, K], the rest float32 nats.

    Raises:
        TeacherFailed: the engine answered another number of entries, other tokens or a NaN.
    """
    prompt_columns = _columns(prompt, num_positions=len(tokens) - 1, k=k)
    sampled_columns = _columns(sampled, num_positions=1, k=k)
    if not np.array_equal(prompt_columns.first_ids, np.asarray(tokens[1:], dtype=np.int64)):
        raise TeacherFailed("the engine's prompt logprobs are not those of the tokens it was given")
    ids = np.concatenate([prompt_columns.ids, sampled_columns.ids])[num_prefix:]
    logprobs = np.concatenate([prompt_columns.logprobs, sampled_columns.logprobs])[num_prefix:]
    labels = prompt_columns.first_logprobs[num_prefix:]
    _refuse_nonsense(logprobs, labels)
    ids, logprobs = _by_falling_logprob(ids, logprobs)
    return Targets(
        ids=ids.astype(np.uint32),
        logprobs=logprobs,
        log_tail=log_tail(logprobs) if k < vocab_size else np.full(len(ids), -np.inf, dtype=np.float32),
        label_logprob=np.append(labels, np.float32(np.nan)),
    )


def log_tail(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """[T] log of the mass outside [T, K] float32 `logprobs`, summed in float64; -inf under `TAIL_FLOOR`."""
    tail = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    answer = np.full(len(logprobs), -np.inf)
    np.log(tail, out=answer, where=tail >= TAIL_FLOOR)
    return answer.astype(np.float32)


def _columns(entries: FlatEntries, *, num_positions: int, k: int) -> _Columns:
    expected = num_positions * (k + 1)
    if len(entries.ids) != expected or len(entries.logprobs) != expected:
        raise TeacherFailed(
            f"the engine answered {len(entries.ids)} ids and {len(entries.logprobs)} logprobs"
            f" where {num_positions} positions of {k + 1} were due"
        )
    ids = np.asarray(entries.ids, dtype=np.int64).reshape(num_positions, k + 1)
    logprobs = np.asarray(entries.logprobs, dtype=np.float32).reshape(num_positions, k + 1)
    return _Columns(ids[:, 0], logprobs[:, 0], ids[:, 1:], logprobs[:, 1:])


def _refuse_nonsense(logprobs: NDArray[np.float32], labels: NDArray[np.float32]) -> None:
    """-inf is a masked token; NaN and +inf are no logprob at all."""
    for name, values in (("top-k", logprobs), ("label", labels)):
        if not np.all(values < np.inf):  # False for NaN too
            position = int(np.argwhere(~(values < np.inf))[0][0])
            raise TeacherFailed(f"the engine answered a {name} logprob that is not a number at position {position}")


def _by_falling_logprob(
    ids: NDArray[np.int64], logprobs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Both as they are when already sorted, as nearly always; else sorted, ties in the order given."""
    if np.all(logprobs[:, 1:] <= logprobs[:, :-1]):
        return ids, np.ascontiguousarray(logprobs)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
