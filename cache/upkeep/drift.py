"""Drift: the distance of stored targets from what a live teacher answers for the same rows now.

Shape legend:  P positions, K kept entries, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding import Encoding
from potstill.cache.encoding.logprobs import distances, kl_terms
from potstill.cache.errors import InvalidInput, NotCommitted, SpecMismatch
from potstill.cache.targets import TargetSet
from potstill.cache.types import Fields, Targets, Teacher, TeacherIdentity

# Rows at the teacher at one time.
_BATCH_ROWS = 4
# The largest code of a `u8` gap is 255/16 nats. An entry behind such a gap need not be within the bound.
_SATURATED_GAP = 15.9
# Relative rounding error of float16, in which labels are stored.
_FLOAT16_ERROR = 2.0**-11


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Drift of a sample of rows, in nats."""

    rows: int
    positions: int
    max_abs: float
    """Largest |stored - live| over the entries that both top-ks have. A stored entry that the live top-k lacks counts
    with its height above the last live one; entries that did not fit their code are left out."""
    mean_abs: float
    """Mean of |stored - live| over the entries that both top-ks have."""
    mean_kl: float
    """Mean over positions of KL(stored || live), over the entries that both have and one bucket of all others."""
    same_ids: float
    """Share of the stored entries that the live top-k has too."""
    label_max_abs: float
    label_over_bound: float
    """Excess of the worst label over its own bound, the encoding's or float16's; 0 when none exceeds it."""
    encoding: str
    bound: float
    """Largest error of a logprob that the encoding alone can cause."""

    def within(self, tolerance: float) -> bool:
        """Tell whether the drift is at most the encoding's own error plus `tolerance` nats."""
        return self.max_abs <= self.bound + tolerance and self.label_over_bound <= tolerance


def check_same_vocabulary(stored: TeacherIdentity, live: TeacherIdentity) -> str:
    """Describe in words the differences between two identities; empty when there are none.

    Raises:
        SpecMismatch: the tokenizer or the vocabulary differs, so that ids do not mean the same.
    """
    for name in ("tokenizer_sha256", "vocab_size"):
        ours, theirs = getattr(stored, name), getattr(live, name)
        if ours != theirs:
            raise SpecMismatch(
                f"the stored targets have {name} {str(ours)[:12]}, the live teacher has {str(theirs)[:12]}: their ids "
                "do not mean the same; name the model that the targets are of"
            )
    return stored.differences(live)


def sample_rows(targets: TargetSet, count: int, seed: int) -> list[int]:
    """Draw distinct committed rows at random, sorted; fewer than `count` when there are no more.

    Raises:
        InvalidInput: `count` is below 1, or `seed` below 0. NotCommitted: no row is committed.
    """
    if count < 1:
        raise InvalidInput(f"--sample is {count}; it must be at least 1")
    if seed < 0:
        raise InvalidInput(f"--seed is {seed}; it must be at least 0")
    starts = targets.corpus.shard_rows
    shards = np.flatnonzero(targets.committed)
    ends = np.cumsum(starts[shards + 1] - starts[shards])
    if not len(ends):
        raise NotCommitted(f"teacher {targets.teacher!r} has no committed shard of corpus {targets.corpus.name!r}")
    total = int(ends[-1])
    chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False, shuffle=False)
    places = np.sort(chosen)
    of_shard = np.searchsorted(ends, places, side="right")
    rows: list[int] = (starts[shards[of_shard] + 1] - (ends[of_shard] - places)).tolist()
    return rows


async def measure_drift(teacher: Teacher, targets: TargetSet, rows: Sequence[int]) -> Drift:
    """Score rows again and compare the answers with the stored targets, which must have a top-k.

    Raises:
        CorruptSegment: stored bytes are damaged.
        PotstillError: whatever the teacher raises.
    """
    limit = teacher.limits.max_top_k
    k = targets.fields.k if limit is None else min(limit, targets.fields.k)
    tally = _Tally(targets.encoding)
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        stored = targets.read_rows(batch, fields=Fields(k=k))
        live = await teacher.score([targets.corpus.row(row) for row in batch], Fields(k=k))
        for ours, theirs in zip(stored, live, strict=True):
            tally.add(ours, theirs)
    return tally.drift()


class _Tally:
    """Sums and maxima over rows that come one after the other."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._rows = self._positions = self._entries = self._shared = 0
        self._max_abs = self._sum_abs = self._sum_kl = self._label_max = self._label_over = 0.0

    def add(self, stored: Targets, live: Targets) -> None:
        """Add one row."""
        # In float64: sums over many positions, and differences of numbers that are nearly equal.
        ours, theirs = stored.logprobs.astype(np.float64), live.logprobs.astype(np.float64)
        place = _places(stored.ids, live.ids)
        shared = place >= 0
        at_live = np.take_along_axis(theirs, np.maximum(place, 0), axis=1)
        in_code = _in_code(ours, self._encoding)
        difference = distances(ours, at_live)[shared & in_code]
        beyond = np.maximum(ours - theirs[:, -1:], 0.0)[~shared & in_code]
        self._rows += 1
        self._positions += len(ours)
        self._entries += shared.size
        self._shared += int(shared.sum())
        self._sum_abs += float(difference.sum())
        self._max_abs = max(self._max_abs, float(difference.max(initial=0.0)), float(beyond.max(initial=0.0)))
        self._sum_kl += float(_kl(stored, live, shared, at_live).sum())
        self._add_labels(stored.label_logprob.astype(np.float64), live.label_logprob.astype(np.float64))

    def drift(self) -> Drift:
        """Drift of all rows so far."""
        return Drift(
            rows=self._rows,
            positions=self._positions,
            max_abs=self._max_abs,
            mean_abs=self._sum_abs / max(self._shared, 1),
            mean_kl=self._sum_kl / max(self._positions, 1),
            same_ids=self._shared / max(self._entries, 1),
            label_max_abs=self._label_max,
            label_over_bound=self._label_over,
            encoding=self._encoding.name,
            bound=self._encoding.max_abs_error,
        )

    def _add_labels(self, stored: NDArray[np.float64], live: NDArray[np.float64]) -> None:
        have = ~np.isnan(stored) & ~np.isnan(live)
        difference = distances(stored[have], live[have])
        # -inf is cut off: its relative error would allow any difference.
        bound = np.maximum(self._encoding.max_abs_error, np.abs(np.maximum(live[have], -1e4)) * _FLOAT16_ERROR)
        self._label_max = max(self._label_max, float(difference.max(initial=0.0)))
        self._label_over = max(self._label_over, float((difference - bound).max(initial=0.0)))
        if not np.array_equal(np.isnan(stored), np.isnan(live)):
            self._label_over = float("inf")


def _places(stored: NDArray[np.uint32], live: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Index [P, K] of each stored id among the live ids of its position; -1 where it is not among them."""
    # One search for all positions: ids have 32 bits, so the position above them keeps the rows of ids apart.
    order = np.argsort(live, axis=1, kind="stable")
    base = np.arange(len(live), dtype=np.int64)[:, None] << 32
    ranked = (np.take_along_axis(live, order, axis=1).astype(np.int64) + base).reshape(-1)
    wanted = stored.astype(np.int64) + base
    at = np.minimum(np.searchsorted(ranked, wanted.reshape(-1)), len(ranked) - 1)
    found = (ranked[at] == wanted.reshape(-1)).reshape(stored.shape)
    places = order.reshape(-1)[at].reshape(stored.shape)
    return np.where(found, places, -1)


def _in_code(stored: NDArray[np.float64], encoding: Encoding) -> NDArray[np.bool_]:
    """Mask [P, K] of the entries before the first gap that did not fit its code."""
    if encoding.name in ("f16", "f32"):
        return np.ones(stored.shape, dtype=bool)
    wide = np.zeros(stored.shape, dtype=bool)
    wide[:, 1:] = stored[:, :-1] - stored[:, 1:] > _SATURATED_GAP
    return ~np.logical_or.accumulate(wide, axis=1)


def _kl(stored: Targets, live: Targets, shared: NDArray[np.bool_], at_live: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(stored || live) [P] over the shared entries and one bucket of all others."""
    ours, theirs = stored.logprobs.astype(np.float64), live.logprobs.astype(np.float64)
    rest_ours = np.exp(stored.log_tail.astype(np.float64)) + np.where(shared, 0.0, np.exp(ours)).sum(axis=1)
    shared_live = _places(live.ids, stored.ids) >= 0
    rest_theirs = np.exp(live.log_tail.astype(np.float64)) + np.where(shared_live, 0.0, np.exp(theirs)).sum(axis=1)
    with np.errstate(divide="ignore"):
        rest = kl_terms(np.log(rest_ours), np.log(rest_theirs))
    kl: NDArray[np.float64] = np.where(shared, kl_terms(ours, at_live), 0.0).sum(axis=1) + rest
    return kl
