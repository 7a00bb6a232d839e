"""The making of `Targets` from the engine's answers. The position convention is decided here, once.

Target *t* of a row is the distribution of the token **after** `row[t]`. With n prefix tokens in front, the engine
sees prefix + row and the first n targets are dropped.

vLLM's own prompt logprobs, on the paths `public-flat` and `arrays`, have one position per prompt token: position *i*
scores token *i* given the tokens before it, so position 0 is empty. Each further position is `K + 1` entries: column
0 is the token that really stands there, columns 1..K are the top-K by falling logprob. Columns 1..K may hold the token
of column 0 once more; nothing is deduplicated. A row of T tokens takes targets 0..T-2 from prompt positions 1..T-1,
their labels from column 0, and target T-1 from the one sampled token's logprobs. Their column 0 is the sampled token
and is not used: the last target has no label.

On the path `sampler` the worker has computed all T targets itself (`capture.layout`).

Pure functions on numbers: no engine is needed to call or to test them.

Shapes: P = prefix + row tokens, T = row tokens, K kept entries, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import TeacherFailed
from potstill.cache.types import Draws, Targets
from potstill.teacher_service.capture.layout import Asked, Captured, float_sections, num_floats, split

TAIL_FLOOR = 1e-6
"""Smallest tail mass that is kept; a smaller one becomes 0. float32 logprobs of a peaked row cannot resolve less, and
their sum may even pass 1."""

_TAIL_ROWS = 1024
"""Positions whose masses are summed at once, which bounds the float64 copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatEntries:
    """Ids and logprobs of some positions, `K + 1` each: flat lists as vLLM hands them over, or arrays [n, K + 1]."""

    ids: Sequence[int] | NDArray[np.integer]
    logprobs: Sequence[float] | NDArray[np.floating]


def targets_from_flat(prompt: FlatEntries, sampled: FlatEntries, asked: Asked, vocab_size: int) -> Targets:
    """Make the targets of one row from vLLM's prompt logprobs.

    Args:
        prompt: entries of prompt positions 1..P-1, empty when P is 1.
        sampled: entries of the one sampled token.
        asked: the row, and K of at most `vocab_size`.
        vocab_size: V; with K = V nothing is outside the top-k.

    Returns:
        T targets: `ids` uint32 [T, K], the rest float32 nats.

    Raises:
        TeacherFailed: the engine answered another number of entries, other tokens or a NaN.
    """
    num_prefix, k = asked.num_prefix, asked.want.k
    prompt_ids, prompt_logprobs = _arrays(prompt, num_positions=len(asked.tokens) - 1, k=k)
    last_ids, last_logprobs = _arrays(sampled, num_positions=1, k=k)
    if not np.array_equal(prompt_ids[:, 0], np.asarray(asked.tokens[1:], dtype=np.int64)):
        raise TeacherFailed("the engine's prompt logprobs are not those of the tokens it was given")
    ids = np.concatenate([prompt_ids[num_prefix:, 1:], last_ids[:, 1:]])
    logprobs = np.concatenate([prompt_logprobs[num_prefix:, 1:], last_logprobs[:, 1:]])
    label_logprob = np.append(prompt_logprobs[num_prefix:, 0], np.float32(np.nan))
    return _top_k_targets(ids, logprobs, label_logprob, vocab_size)


def targets_from_captured(captured: Captured, asked: Asked, vocab_size: int) -> Targets:
    """Make the targets of one row from the worker's arrays, as views of them where possible.

    Args:
        captured: the arrays of one request.
        asked: the row, and the fields of it.
        vocab_size: V.

    Raises:
        TeacherFailed: the worker failed, answered other tokens or another number of values, a NaN, or an entropy or
            log_z that is not finite.
    """
    want, row = asked.want, np.asarray(asked.tokens[asked.num_prefix :], dtype=np.int32)
    sections = float_sections(want, len(row), vocab_size)
    if not len(captured.floats):
        reason = captured.ints.tobytes().decode(errors="replace").partition("\n")[0]
        raise TeacherFailed(f"the engine could not compute the targets of a row: {reason}")
    if captured.ids.shape != (len(row), want.k) or captured.floats.shape != (num_floats(sections),):
        raise TeacherFailed(
            f"the engine answered ids of shape {captured.ids.shape} and {captured.floats.size} numbers"
            f" where {(len(row), want.k)} and {num_floats(sections)} were due"
        )
    if not np.array_equal(captured.ints[: len(row)], row):
        raise TeacherFailed("the engine's targets are not those of the tokens it was given")
    parts = split(captured.floats, sections)
    top = parts.pop("top")
    _refuse_nonsense("logprob", top)
    for name in ("entropy", "log_z"):
        if name in parts and not np.isfinite(parts[name]).all():
            position = int(np.argwhere(~np.isfinite(parts[name]))[0][0])
            raise TeacherFailed(f"the engine answered {name} {parts[name][position]} at position {position}, no number")
    if want.k:
        label_logprob = parts.pop("label_logprob")
        label_logprob[-1] = np.nan  # the worker took some id there, for want of a label
        targets = _top_k_targets(captured.ids, parts.pop("logprobs"), label_logprob, vocab_size)
    else:
        targets = Targets.of_other_fields(len(row))
    draws = _draws(captured.ints[len(row) :], len(row), want.draws) if want.draws else None
    return replace(targets, draws=draws, **parts)


def log_tail(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log of the tail mass, [T] float32: of what [T, K] `logprobs` leave of 1; -inf under `TAIL_FLOOR`."""
    # float64: a tail of 1e-6 is 16 units in the last place of a float32 sum near 1.
    tail = np.empty(len(logprobs))
    ones = np.ones(logprobs.shape[1])
    for start in range(0, len(logprobs), _TAIL_ROWS):
        part = logprobs[start : start + _TAIL_ROWS]
        # A product with ones sums up a row several times faster than `sum` along a short axis.
        np.matmul(np.exp(part, dtype=np.float64), ones, out=tail[start : start + len(part)])
    np.subtract(1.0, tail, out=tail)
    answer = np.full(len(logprobs), -np.inf)
    np.log(tail, out=answer, where=tail >= TAIL_FLOOR)
    return answer.astype(np.float32)


def _top_k_targets(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], label_logprob: NDArray[np.float32], vocab_size: int
) -> Targets:
    # First, as a NaN compares false with everything: what is below would neither sort nor sum it rightly.
    _refuse_nonsense("top-k logprob", logprobs)
    _refuse_nonsense("label logprob", label_logprob[:-1])
    ids, logprobs = _by_falling_logprob(ids, logprobs)
    # Nothing is outside a top-k of the whole vocabulary, whatever the rounding of its sum leaves.
    whole = logprobs.shape[1] >= vocab_size
    return Targets(
        ids=ids.view(np.uint32),
        logprobs=logprobs,
        log_tail=np.full(len(ids), -np.inf, dtype=np.float32) if whole else log_tail(logprobs),
        label_logprob=label_logprob,
    )


def _draws(ints: NDArray[np.generic], num_positions: int, num_draws: int) -> Draws:
    """Make draws of the worker's [T] numbers of unique ids, [U] ids and [U] counts."""
    values = ints.astype(np.int64)
    offsets = np.zeros(num_positions + 1, np.int64)
    np.cumsum(values[:num_positions], out=offsets[1:])
    num_unique = int(offsets[-1])
    if len(values) != num_positions + 2 * num_unique:
        raise TeacherFailed(f"the engine answered {len(values)} numbers for {num_unique} drawn ids")
    ids, counts = values[num_positions:].reshape(2, num_unique)
    if num_positions and not (np.add.reduceat(counts, offsets[:-1]) == num_draws).all():
        raise TeacherFailed(f"the engine answered another number of draws than {num_draws} a position")
    return Draws(offsets, ids.astype(np.uint32), counts.astype(np.uint16))


def _arrays(entries: FlatEntries, *, num_positions: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and logprobs as [n, K + 1]."""
    ids, logprobs = np.asarray(entries.ids, dtype=np.int32), np.asarray(entries.logprobs, dtype=np.float32)
    expected = num_positions * (k + 1)
    if ids.size != expected or logprobs.size != expected:
        raise TeacherFailed(
            f"the engine answered {ids.size} ids and {logprobs.size} logprobs"
            f" where {num_positions} positions of {k + 1} were due"
        )
    return ids.reshape(num_positions, k + 1), logprobs.reshape(num_positions, k + 1)


def _refuse_nonsense(name: str, values: NDArray[np.float32]) -> None:
    """Refuse NaN and +inf, which are no logprobs; -inf is a masked token."""
    if not np.all(values < np.inf):  # False for NaN too
        position = int(np.argwhere(~(values < np.inf))[0][0])
        raise TeacherFailed(f"the engine answered a {name} that is not a number at position {position}")


def _by_falling_logprob(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Sort both by falling logprob, ties in the order given. They nearly always are sorted already."""
    if np.all(logprobs[:, 1:] <= logprobs[:, :-1]):
        return np.ascontiguousarray(ids), np.ascontiguousarray(logprobs)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
