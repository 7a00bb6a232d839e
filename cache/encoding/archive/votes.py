"""Candidates for a position's ranks, from the lists of similar earlier positions; see `archive.ids`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.model import (
    CLASSES,
    FOLLOWED,
    LEADING,
    NEAR,
    RATIOS,
    USED,
    VOTERS,
    Links,
    Lists,
    Model,
)
from potstill.cache.encoding.archive.range_coder import compiled


@compiled
def _see(model: Model, position: int, found: int, weight: int) -> int:
    if model.similarity[position] == 0:
        model.voters[found] = position
        found += 1
    model.similarity[position] += weight
    return found


@compiled
def _follow(model: Model, links: NDArray[np.int64], position: int, found: int, weight: int) -> int:
    position = links[position]
    for _ in range(FOLLOWED):
        if position < 0:
            break
        found = _see(model, position, found, weight)
        position = links[position]
    return found


@compiled
def _follow_rank(model: Model, rank: int, found: int) -> int:
    entry = model.heads[rank]
    for _ in range(FOLLOWED):
        if entry < 0:
            break
        found = _see(model, entry // LEADING, found, 1)
        entry = model.chain[entry]
    return found


@compiled
def find_voters(lists: Lists, links: Links, model: Model, position: int, known: int) -> int:
    """Collect similar positions in `voters`; returns their number."""
    found = _follow(model, links.same, position, 0, 1)
    found = _follow(model, links.same_before, position, found, 2)
    found = _follow(model, links.same_after, position, found, 2)
    for back in range(1, NEAR + 1):
        if position - back < links.row_begins[position]:
            break
        found = _see(model, position - back, found, 1)
    if links.labels[position] >= 0:
        found = _follow_rank(model, links.labels[position], found)
    start = lists.starts[position]
    for i in range(min(known, LEADING)):
        found = _follow_rank(model, np.int64(lists.ids[start + i]), found)
    return found


@compiled
def choose_voters(model: Model, found: int) -> tuple[int, int, int]:
    """Move the most similar voters to the front; returns the highest similarity, their number, and sum of weights."""
    levels = model.levels
    levels[:] = 0
    for i in range(found):
        levels[model.similarity[model.voters[i]]] += 1
    top, least, above = 0, len(levels) - 1, 0
    while least > 1 and above + levels[least] < VOTERS:
        above += levels[least]
        if levels[least] > 0 and top == 0:
            top = least
        least -= 1
    top = max(top, least) if levels[least] > 0 or top > 0 else 0
    rest = VOTERS - above
    chosen, weight = 0, 0
    for i in range(found):
        voter = model.voters[i]
        level = model.similarity[voter]
        if level < least or (level == least and rest == 0):
            continue
        rest -= 1 if level == least else 0
        model.voters[i] = model.voters[chosen]
        model.voters[chosen] = voter
        chosen += 1
        weight += level * level
    return top, chosen, weight


@compiled
def vote(lists: Lists, model: Model, voters: int, depth: int) -> int:
    """Add up votes in `score`; returns the number of candidates."""
    count = 0
    score, candidates = model.score, model.candidates
    for i in range(voters):
        voter = model.voters[i]
        weight = model.similarity[voter] * model.similarity[voter]
        first = lists.starts[voter]
        for entry in range(first, min(first + depth, lists.starts[voter + 1])):
            rank = np.int64(lists.ids[entry])
            if score[rank] == 0:
                candidates[count] = rank
                count += 1
            score[rank] += weight * lists.votes[entry]
    return count


@compiled
def classify(lists: Lists, model: Model, count: int, weight: int) -> int:
    """Sort candidates that are not used into `members`, drop the others, clear `score`; returns the number left."""
    scale = ((RATIOS - 1) << 40) // max(weight * lists.max_vote, 1)
    candidates, sizes, begins = model.candidates, model.sizes, model.begins
    sizes[:] = 0
    left = 0
    for i in range(count):
        rank = candidates[i]
        ratio = (np.int64(model.score[rank]) * scale) >> 40
        model.score[rank] = 0
        if model.kind[rank] != USED:
            c = lists.classes[ratio]
            model.kind[rank] = c + 1
            sizes[c] += 1
            candidates[left] = rank
            model.member_classes[left] = c
            left += 1
    place = 0
    for c in range(CLASSES):
        begins[c] = place
        place += sizes[c]
        sizes[c] = 0
    for i in range(left):
        c = model.member_classes[i]
        model.members[begins[c] + sizes[c]] = candidates[i]
        sizes[c] += 1
    return left
