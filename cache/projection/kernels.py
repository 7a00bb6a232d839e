"""Compiled loops of the projection, position by position.

Shape legend:  n positions of the student's rows, m positions of the teacher's that they need, K and J kept entries of
the teacher and of the student, V and W ids of the teacher and of the student, O open ids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.compiled import compiled
from potstill.cache.projection.first_tokens import FirstTokens
from potstill.cache.projection.spelling import NONE


class Taught(NamedTuple):
    """The teacher's targets, and its way through the text. Numba takes a tuple of arrays as it is."""

    ids: NDArray[np.uint32]
    """[m, K]"""
    logprobs: NDArray[np.float32]
    """[m, K]"""
    log_tail: NDArray[np.float32]
    """[m]"""
    nexts: NDArray[np.int64]
    """[m] next token of the document; `NONE` behind the last."""
    ends: NDArray[np.int64]
    """[m + 1] unit at which each token ends, that after the last included."""
    path: NDArray[np.float64]
    """[m] logprob of the next token; NaN where it is not known."""


class Wanted(NamedTuple):
    """The student's positions."""

    places: NDArray[np.int64]
    """[n] the teacher's position at the same place of the text; `NONE` where it has none."""
    nexts: NDArray[np.int64]
    """[n] next token of the document; `NONE` behind the last."""
    next_ends: NDArray[np.int64]
    """[n] unit at which that one ends."""
    at_start: NDArray[np.bool_]
    """[n] true where a document's text begins."""
    has_label: NDArray[np.bool_]
    """[n] true where the row has a next token."""


class Made(NamedTuple):
    """The student's targets, to be written."""

    ids: NDArray[np.uint32]  # [n, J]
    logprobs: NDArray[np.float32]  # [n, J]
    log_tail: NDArray[np.float32]  # [n]
    label_logprob: NDArray[np.float32]  # [n]
    unresolved: NDArray[np.float64]  # [n]


@compiled
def path_logprobs(
    ids: NDArray[np.uint32], logprobs: NDArray[np.float32], labels: NDArray[np.float32], nexts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Logprob [m] of the next token at each position: the label's, or of a row's last position the entry's."""
    path = np.full(len(nexts), np.nan)
    for t in range(len(nexts)):
        path[t] = labels[t]
        if np.isnan(labels[t]) and nexts[t] != NONE:
            for j in range(ids.shape[1]):
                if ids[t, j] == nexts[t]:
                    path[t] = logprobs[t, j]
    return path


@compiled
def covered(taught: Taught, t: int, end: int) -> float:
    """Log-likelihood of the tokens after position t that cover the text up to a unit; NaN where it is not known."""
    total = 0.0
    while t < len(taught.nexts) and taught.nexts[t] != NONE:
        total += taught.path[t]
        t += 1
        if taught.ends[t] >= end:
            return float(total)
    return np.nan


@compiled
def staying(taught: Taught, mapped: FirstTokens, t: int, number: int) -> float:
    """Mass at position t of what cannot be a part of a token that goes on from the open id before it."""
    mass = 0.0
    if t >= len(taught.nexts):
        return mass
    for j in range(taught.ids.shape[1]):
        byte = mapped.first_bytes[taught.ids[t, j]]
        if byte == NONE or not mapped.going_on[number, byte]:
            mass += np.exp(np.float64(taught.logprobs[t, j]))
    return min(mass, 1.0)


@compiled
def sum_staying(taught: Taught, mapped: FirstTokens, sums: NDArray[np.float64]) -> None:
    """Add to [2, O] how often each open id stands in the text, and the mass of what then stays apart from it."""
    for t in range(len(taught.nexts) - 1):
        token = taught.nexts[t]
        if token != NONE and mapped.opening[token] != NONE:
            number = mapped.opening[token]
            sums[0, number] += 1.0
            sums[1, number] += staying(taught, mapped, t + 1, number)


@compiled
def add_entries(
    taught: Taught,
    mapped: FirstTokens,
    wanted: Wanted,
    i: int,
    slots: NDArray[np.int64],
    masses: NDArray[np.float64],
    made: Made,
) -> int:
    """Sum the entries of position i by the student's ids into row i of `made`, unsorted; the number of ids.

    `slots` [W] has the place of each id in the row; an id that one whole entry alone goes to keeps its logprob's bits.
    """
    t, count = wanted.places[i], 0
    for j in range(taught.ids.shape[1]):
        logprob, v = taught.logprobs[t, j], taught.ids[t, j]
        token = mapped.at_start[v] if wanted.at_start[i] else mapped.inside[v]
        number, label, further = mapped.opening[v], wanted.nexts[i], 0.0
        share = 1.0 if number == NONE else mapped.stays[number]
        if v == taught.nexts[t] and label != NONE:
            if number != NONE:
                share = staying(taught, mapped, t + 1, number)
            if taught.ends[t + 1] < wanted.next_ends[i]:
                # The student's token goes on behind v: that much of v is the label's.
                further = np.exp(covered(taught, t, wanted.next_ends[i]) - taught.path[t])
                further = 0.0 if np.isnan(further) else further
                share = min(share, 1.0 - further) if number != NONE else 0.0
            else:
                token = label
        if token == NONE:
            share = 0.0
        made.unresolved[i] += np.exp(np.float64(logprob)) * (1.0 - share - further)
        if share > 0.0:
            count = add_mass(i, token, logprob, share, count, slots, masses, made)
        if further > 0.0:
            count = add_mass(i, label, logprob, further, count, slots, masses, made)
    return count


@compiled
def add_mass(
    i: int,
    token: int,
    logprob: float,
    share: float,
    count: int,
    slots: NDArray[np.int64],
    masses: NDArray[np.float64],
    made: Made,
) -> int:
    """Add a share of an entry to one id of row i; the number of ids. There are never more than the row is long."""
    mass, slot = np.exp(np.float64(logprob)) * share, slots[token]
    if slot != NONE:
        masses[slot] += mass
        made.logprobs[i, slot] = np.log(masses[slot])
        return count
    if count == made.ids.shape[1]:
        made.unresolved[i] += mass
        return count
    slots[token], made.ids[i, count], masses[count] = count, token, mass
    made.logprobs[i, count] = logprob if share == 1.0 else np.log(mass)
    return count + 1


@compiled
def finish(i: int, count: int, slots: NDArray[np.int64], made: Made) -> None:
    """Sort a row by falling logprob, equal ones as they came, and fill it up with ids of no mass; empty `slots`."""
    ids, logprobs = made.ids[i], made.logprobs[i]
    spare = 0
    for slot in range(count, len(ids)):
        while slots[spare] != NONE:
            spare += 1
        ids[slot], logprobs[slot] = spare, -np.inf
        spare += 1
    for slot in range(count):
        slots[ids[slot]] = NONE
    for slot in range(1, count):
        token, logprob = ids[slot], logprobs[slot]
        at = slot
        while at > 0 and logprobs[at - 1] < logprob:
            ids[at], logprobs[at] = ids[at - 1], logprobs[at - 1]
            at -= 1
        ids[at], logprobs[at] = token, logprob


@compiled
def label_of(taught: Taught, mapped: FirstTokens, wanted: Wanted, i: int, slot: int, count: int, made: Made) -> float:
    """Logprob of the row's own next token, in the place `slot` of a row that is not sorted yet; NaN where unknown."""
    if not wanted.has_label[i]:
        return np.nan
    if slot != NONE:
        return float(made.logprobs[i, slot])
    t = wanted.places[i]
    if count < made.ids.shape[1] or (taught.nexts[t] != NONE and mapped.opening[taught.nexts[t]] != NONE):
        return np.nan
    found = np.float32(covered(taught, t, wanted.next_ends[i]))
    return float(found) if found <= made.logprobs[i, :count].min() else np.nan


@compiled
def project_rows(taught: Taught, mapped: FirstTokens, wanted: Wanted, num_ids: int, made: Made) -> None:
    """Make the student's targets of n positions, whose vocabulary has `num_ids`."""
    slots = np.full(num_ids, NONE, np.int64)
    masses = np.zeros(taught.ids.shape[1])
    for i in range(len(wanted.places)):
        t, count = wanted.places[i], 0
        made.unresolved[i], made.log_tail[i], made.label_logprob[i] = 0.0, 0.0, np.nan
        if t == NONE:
            made.unresolved[i] = 1.0
        else:
            count = add_entries(taught, mapped, wanted, i, slots, masses, made)
            slot = slots[wanted.nexts[i]] if wanted.nexts[i] != NONE else NONE
            made.label_logprob[i] = label_of(taught, mapped, wanted, i, slot, count, made)
            made.log_tail[i] = taught.log_tail[t]
            if made.unresolved[i] > 0.0:
                tail = np.exp(np.float64(taught.log_tail[t])) + made.unresolved[i]
                made.log_tail[i] = min(np.log(tail), 0.0)
        finish(i, count, slots, made)
