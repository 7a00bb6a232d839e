"""Checks of any teacher by scoring rows: one in this process, or one behind HTTP that is asked to keep nothing.

A few short rows are scored, at most `rounds` times each; nothing is written.

Shape legend:  T tokens of a row, P positions, K kept entries, V vocabulary size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from potstill.cache.encoding.logprobs import distances
from potstill.cache.errors import InvalidInput, LimitExceeded, UnsupportedField
from potstill.cache.types import Fields, Targets, Teacher, Tokens
from potstill.clients.doctor.findings import Finding, Verdict, found

_MASS_ERROR = 1e-3  # float32 logprobs of 64 entries and a tail add up to 1 within 1e-5; an encoding keeps it so
_UNMOVED = 1e-6  # nats: what a target may move that does not depend on what was changed
_K = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Probing:
    """Tolerance and effort of the checks.

    Raises:
        InvalidInput: the tolerance is not positive, or `rounds` or `row_tokens` is under 2.
    """

    tolerance: float = 0.05
    """Nats by which two scores of the same row may differ: batching alone moves a bfloat16 model by about 0.03."""
    rounds: int = 8
    """Scores of one row, so that every replica answers it."""
    row_tokens: int = 48
    max_probe_tokens: int = 4096
    """Longest row that is scored only to see that it can be."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tolerance > 0 or self.rounds < 2 or self.row_tokens < 2:
            raise InvalidInput("tolerance must be over 0 nats, rounds and row tokens at least 2")


async def check_teacher(teacher: Teacher, name: str, probing: Probing) -> list[Finding]:
    """Make every check of a teacher, one after the other."""
    checks: dict[str, Callable[[Teacher, Probing], Awaitable[Verdict]]] = {
        "mass and order": _mass,
        "offsets": _offsets,
        "replicas agree": _replicas,
        "same draws again": _draws,
        "K limit": _top_k_limit,
        "row limit": _row_limit,
    }
    return [await found(check, name, look(teacher, probing)) for check, look in checks.items()]


def probe_row(teacher: Teacher, probing: Probing, num_tokens: int | None = None) -> Tokens:
    """A row [T] uint32 of random ids, always the same ones, which can still be made one token longer."""
    longest = (teacher.limits.max_row_tokens or probing.row_tokens + 1) - 1
    length = min(num_tokens or probing.row_tokens, max(longest, 1))
    rng = np.random.default_rng(probing.seed)
    return rng.integers(0, teacher.identity.vocab_size, length).astype(np.uint32)


def difference(ours: Targets, theirs: Targets) -> float:
    """The largest difference in nats between two top-k of the same positions.

    An entry that one of them lacks counts by how far it is above the last entry that this one has: below it, the entry
    may rightly have been cut off.
    """
    return max(_one_way(ours, theirs), _one_way(theirs, ours))


def _one_way(ours: Targets, theirs: Targets) -> float:
    same = ours.ids[:, :, None] == theirs.ids[:, None, :]
    there = np.take_along_axis(theirs.logprobs, same.argmax(axis=2), axis=1)
    beyond = np.maximum(distances(ours.logprobs, np.minimum(ours.logprobs, theirs.logprobs[:, -1:])), 0.0)
    apart = np.where(same.any(axis=2), distances(ours.logprobs, there), beyond)
    return float(apart.max(initial=0.0))


def _fields(teacher: Teacher) -> Fields:
    return Fields(k=min(_K, teacher.limits.max_top_k or teacher.identity.vocab_size))


async def _mass(teacher: Teacher, probing: Probing) -> Verdict:
    [targets] = await teacher.score([probe_row(teacher, probing)], _fields(teacher))
    kept = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1)
    off = np.abs(kept + np.exp(targets.log_tail.astype(np.float64)) - 1.0)
    worst = float(off.max()) if np.isfinite(off).all() else float("inf")
    way_out = "the teacher's numbers mean no distribution: look at its dtype and its capture path"
    if worst > _MASS_ERROR:
        return Verdict("fail", f"top-k and tail hold {worst:.2g} more or less than 1", way_out)
    if (np.diff(targets.logprobs, axis=1) > 0).any():
        return Verdict("fail", "entries do not come by falling logprob", way_out)
    vocab_size = teacher.identity.vocab_size
    if int(targets.ids.max()) >= vocab_size:
        return Verdict("fail", f"id {int(targets.ids.max())} is over the vocabulary of {vocab_size}", way_out)
    return Verdict("ok", f"top-{targets.k} and tail are 1 within {worst:.1g}; the top-k holds {kept.mean():.0%}")


async def _offsets(teacher: Teacher, probing: Probing) -> Verdict:
    """Check that target t is the distribution after `row[t]`, and is not shifted by a position either way."""
    row, fields = probe_row(teacher, probing), _fields(teacher)
    end = len(row) - 1
    [whole] = await teacher.score([row], fields)
    best = whole.ids[end, 0]
    other_end = row.copy()
    other_end[end] = (int(row[end]) + 1) % teacher.identity.vocab_size
    longer, changed = await teacher.score([np.append(row, best).astype(np.uint32), other_end], fields)
    moved = difference(whole[end : end + 1], longer[end : end + 1])
    label = abs(float(longer.label_logprob[end]) - float(whole.logprobs[end, 0]))
    earlier = difference(whole[:end], changed[:end]) if end else 0.0
    way_out = "the capture is off by a position: fill nothing from this teacher until it is mended"
    if moved > probing.tolerance:
        return Verdict("fail", f"the last target is {moved:.3g} nats from the same position of a longer row", way_out)
    if not label <= probing.tolerance:  # NaN too
        return Verdict("fail", f"a label is {label:.3g} nats from the same token's own entry", way_out)
    if not np.isnan(whole.label_logprob[end]):
        return Verdict("fail", "the last target has a label, though no token follows it", way_out)
    if earlier > probing.tolerance:
        return Verdict("fail", f"targets move by {earlier:.3g} nats with a token that comes after them", way_out)
    if difference(whole[end:], changed[end:]) <= _UNMOVED:
        return Verdict("fail", "the last target does not depend on the last token", way_out)
    return Verdict("ok", f"the last target is {moved:.2g} nats from the same position of a longer row")


async def _replicas(teacher: Teacher, probing: Probing) -> Verdict:
    row, fields = probe_row(teacher, probing), _fields(teacher)
    answers = await asyncio.gather(*(teacher.score([row], fields) for _ in range(probing.rounds)))
    worst = max(difference(answers[0][0], answer[0]) for answer in answers[1:])
    told = f"the same row scored {probing.rounds} times differs by {worst:.2g} nats at most"
    if worst <= probing.tolerance:
        return Verdict("ok", told)
    return Verdict(
        "fail", f"{told}, over {probing.tolerance:g}", "the replicas are not of one model: remove and add the teacher"
    )


async def _draws(teacher: Teacher, probing: Probing) -> Verdict:
    row = probe_row(teacher, probing)
    want = Fields(k=_fields(teacher).k, draws=8, seed=1)
    try:
        answers = [(await teacher.score([row], want))[0].draws for _ in range(2)]
    except UnsupportedField as error:
        return Verdict("not run", error.detail)
    first, second = answers
    assert first is not None
    assert second is not None
    same = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("offsets", "ids", "counts"))
    if same:
        return Verdict("ok", "8 draws a position are the same when they are asked for again")
    return Verdict(
        "warn",
        "the same seed gave other draws: the probabilities moved between the two scores",
        "expected of an engine whose batches move its numbers; a cache keeps the first draws",
    )


async def _top_k_limit(teacher: Teacher, probing: Probing) -> Verdict:
    limit = teacher.limits.max_top_k or teacher.identity.vocab_size
    row = probe_row(teacher, probing, 2)
    [targets] = await teacher.score([row], Fields(k=limit))
    if targets.k != limit:
        return Verdict("fail", f"k={limit} was asked for, {targets.k} came", "mend the teacher's limits")
    if limit >= teacher.identity.vocab_size:
        return Verdict("ok", f"k={limit}, the whole vocabulary, is answered")
    try:
        await teacher.score([row], Fields(k=limit + 1))
    except LimitExceeded:
        return Verdict("ok", f"k={limit} is answered, k={limit + 1} refused")
    return Verdict("fail", f"k={limit + 1} is answered though the limit is {limit}", "mend the teacher's limits")


async def _row_limit(teacher: Teacher, probing: Probing) -> Verdict:
    limit = teacher.limits.max_row_tokens
    if limit is None:
        return Verdict("not run", "the teacher states no limit of its own")
    try:
        await teacher.score([np.zeros(limit + 1, np.uint32)], Fields(k=1))
    except LimitExceeded:
        pass
    else:
        return Verdict("fail", f"a row of {limit + 1} tokens is answered, over the limit", "mend the teacher's limits")
    if limit > probing.max_probe_tokens:
        told = f"a row of {limit + 1} tokens is refused; one of {limit} was not tried"
        return Verdict("ok", f"{told} (over --max-probe-tokens {probing.max_probe_tokens})")
    [targets] = await teacher.score([np.zeros(limit, np.uint32)], Fields(k=1))
    if targets.num_positions != limit:
        return Verdict("fail", f"a row of {limit} tokens got {targets.num_positions} targets", "mend the teacher")
    return Verdict("ok", f"a row of {limit} tokens is scored, one more is refused")
