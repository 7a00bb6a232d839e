"""Coding of lists of ranks, one list per position, by the lists of similar earlier positions; compiled.

A teacher's likely next tokens repeat. Earlier positions of the block count as similar when they have the same token
(more so with the same token before or after it), when they are a few tokens back in the same row, and, once the first
ranks of a list are coded, when their own first ranks are among these. The most similar ones vote for the ranks in
their lists (`archive.votes`). The votes sort these candidates into classes, and a rank is coded as one of the
remaining candidates of a class, each equally likely; the weight of a class is learned on the way. A novel rank, which
has no vote, is coded by its frequency among novel ranks, without the candidates (`archive.novel`). Candidates are
collected anew at each of `STAGES`, when more of the list is known.

Tied entries have no order of their own: they are decoded in rising order, and coded in the order of the classes, each
chosen only from the candidates after the one before.

Shape legend:  p positions, U entries of all lists, V vocabulary size, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.model import (
    CELLS,
    FREQUENCY_LIMIT,
    GROUP,
    LEADING,
    NO_RANK,
    NOVEL,
    ONE,
    SIMILARITY,
    STAGES,
    TIES,
    USED,
    Links,
    Lists,
    Model,
    learn,
)
from potstill.cache.encoding.archive.novel import code_novel, count_novel, open_frequencies
from potstill.cache.encoding.archive.range_coder import FAILED, Coder, Whole, compiled, peek, take, write
from potstill.cache.encoding.archive.votes import choose_voters, classify, find_voters, vote


@compiled
def code_lists(coder: Coder, lists: Lists, links: Links, model: Model) -> None:
    """Code all ranks; stops early when the stream cannot be right."""
    for position in range(len(lists.starts) - 1):
        start, stop = lists.starts[position], lists.starts[position + 1]
        for stage in range(len(STAGES)):
            begin = start + STAGES[stage]
            end = min(stop, start + STAGES[stage + 1]) if stage + 1 < len(STAGES) else stop
            if begin < end:
                _code_stage(coder, lists, links, model, position, stage, begin, end)
            if coder.state[FAILED]:
                return
        _link(lists, model, position)
        # Often at first, when each position teaches much.
        if position & (position - 1) == 0 or position & 255 == 0:
            learn(model)


@compiled
def _code_stage(
    coder: Coder, lists: Lists, links: Links, model: Model, position: int, stage: int, begin: int, end: int
) -> None:
    first = lists.starts[position]
    found = find_voters(lists, links, model, position, begin - first)
    top, voters, weight = choose_voters(model, found)
    count = vote(lists, model, voters, lists.depths[stage])
    count = classify(lists, model, count, weight)
    # Only what was touched is cleared: the array has a place for each position of the block.
    for i in range(found):
        model.similarity[model.voters[i]] = 0
    context = (stage * SIMILARITY + min(top // 3, SIMILARITY - 1)) * CELLS
    model.novel[len(model.novel) - 2 :] = 0
    group = begin
    while group < end:
        after = group + 1
        while after < end and lists.tied[after]:
            after += 1
        _code_group(coder, lists, model, context, group, after, first, begin, count)
        if coder.state[FAILED]:
            return
        group = after
    _close_stage(model, count)


@compiled
def _code_group(
    coder: Coder,
    lists: Lists,
    model: Model,
    context: int,
    start: int,
    stop: int,
    first: int,
    begin: int,
    count: int,
) -> None:
    """Code the tied entries from `start` to `stop` of a list from `first` and a stage from `begin`."""
    if not coder.decoding:
        _order(lists, model, start, stop)
    low_class, low_index, low_rank = 0, 0, -1
    for entry in range(start, stop):
        left = stop - 1 - entry
        ties = (left if left < 2 else min(_tie_class(left), 4)) * 2 + (1 if entry > start else 0)
        row = (context + np.int64(lists.cells[entry])) * TIES + ties
        rank = -1
        if not coder.decoding:
            rank = model.keys[entry - start] & NO_RANK
        if low_class < NOVEL:
            low_class, low_index = _code_class(coder, model, row, low_class, low_index, rank)
        if low_class < NOVEL:
            rank = _remove(model, low_class, low_index)
        else:
            open_frequencies(lists, model, first, begin, count)
            rank = code_novel(coder, model, rank, low_rank)
            low_rank = rank
            count_novel(model, rank)
        model.kind[rank] = USED
        if coder.decoding:
            lists.ids[entry] = rank
        if coder.state[FAILED]:
            return
    if coder.decoding and stop - start > 1:
        _sort(lists.ids, start, stop)


@compiled
def _tie_class(value: int) -> int:
    """Class of a number of ties left: 2 for 2 and 3, 3 for 4 to 7, 4 for more."""
    if value < 4:
        return 2
    return 3 if value < 8 else 4


@compiled
def _order(lists: Lists, model: Model, start: int, stop: int) -> None:
    """Fill `keys` with a group's ranks in the order of coding: by class and index in it, then novel ranks rising."""
    for entry in range(start, stop):
        rank = np.int64(lists.ids[entry])
        kind = np.int64(model.kind[rank])
        # One number sorts by class (8 bits), index in the class (24) and rank (32).
        key = np.int64(NOVEL) << 56 | rank
        if kind != 0:
            key = (kind - 1) << 56 | _index_of(model, kind - 1, rank) << 32 | rank
        model.keys[entry - start] = key
    if stop - start > 1:
        _sort(model.keys, 0, stop - start)


@compiled
def _sort(values: NDArray[np.uint32] | NDArray[np.int64], start: int, stop: int) -> None:
    """Sort values[start:stop] by heapsort: in place, and no slower on values that a hostile stream chose."""
    size = stop - start
    for root in range(size // 2 - 1, -1, -1):
        _sift(values, start, root, size)
    for last in range(size - 1, 0, -1):
        value = values[start]
        values[start] = values[start + last]
        values[start + last] = value
        _sift(values, start, 0, last)


@compiled
def _sift(values: NDArray[np.uint32] | NDArray[np.int64], start: int, root: int, size: int) -> None:
    child = 2 * root + 1
    while child < size:
        if child + 1 < size and values[start + child] < values[start + child + 1]:
            child += 1
        if values[start + root] >= values[start + child]:
            return
        value = values[start + root]
        values[start + root] = values[start + child]
        values[start + child] = value
        root = child
        child = 2 * root + 1


@compiled
def _index_of(model: Model, c: Whole, rank: Whole) -> int:
    begin = model.begins[c]
    index = 0
    while index < model.sizes[c] and model.members[begin + index] != rank:
        index += 1
    return index


@compiled
def _remove(model: Model, c: int, index: int) -> int:
    """Remove a member from its class; the order of the others stays."""
    begin = model.begins[c]
    rank: int = model.members[begin + index]
    model.sizes[c] -= 1
    for i in range(begin + index, begin + model.sizes[c]):
        model.members[i] = model.members[i + 1]
    return rank


@compiled
def _code_class(coder: Coder, model: Model, row: Whole, low_class: int, low_index: int, rank: Whole) -> tuple[int, int]:
    """Code the class of `rank` and its index in the class, which do not come before the given ones."""
    weights, offers = model.weights[row], model.offers[row]
    total = weights[NOVEL]
    for c in range(low_class, NOVEL):
        size = model.sizes[c] - (low_index if c == low_class else 0)
        total += size * weights[c]
        offers[c] += size << 5
    offers[NOVEL] += 32
    chosen, before, index = low_class, np.int64(0), 0
    if coder.decoding:
        target = peek(coder, total)
        while chosen < NOVEL:
            size = model.sizes[chosen] - (low_index if chosen == low_class else 0)
            if before + size * weights[chosen] > target:
                break
            before += size * weights[chosen]
            chosen += 1
        index = (target - before) // weights[chosen] if chosen < NOVEL else 0
        take(coder, before + index * weights[chosen], weights[chosen])
        if chosen == low_class:
            index += low_index
    else:
        kind: int = model.kind[rank]
        chosen = kind - 1 if kind != 0 else NOVEL
        for c in range(low_class, chosen):
            before += (model.sizes[c] - (low_index if c == low_class else 0)) * weights[c]
        if chosen < NOVEL:
            index = _index_of(model, chosen, rank)
        skipped = low_index if chosen == low_class else 0
        write(coder, before + (index - skipped) * weights[chosen], weights[chosen], total)
    model.hits[row, chosen] += 32
    return chosen, index


@compiled
def _close_stage(model: Model, count: int) -> None:
    """Count the novel ranks of a stage, and forget its candidates."""
    for i in range(model.novel[len(model.novel) - 2]):
        rank = model.novel[i]
        if model.total[0] < FREQUENCY_LIMIT:
            model.frequency[rank] += ONE
            model.groups[rank >> GROUP] += ONE
            model.total[0] += ONE
    for i in range(count):
        rank = model.candidates[i]
        if model.kind[rank] != USED:
            model.kind[rank] = 0


@compiled
def _link(lists: Lists, model: Model, position: int) -> None:
    """Enter a position under its leading ranks, by which later positions find it."""
    start, stop = lists.starts[position], lists.starts[position + 1]
    for entry in range(start, stop):
        model.kind[lists.ids[entry]] = 0
    for i in range(min(LEADING, stop - start)):
        rank = np.int64(lists.ids[start + i])
        model.chain[position * LEADING + i] = model.heads[rank]
        model.heads[rank] = position * LEADING + i
