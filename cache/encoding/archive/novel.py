"""Coding of novel ranks, which have no vote, by their frequency among novel ranks; see `archive.ids`."""

from __future__ import annotations

import numpy as np

from potstill.cache.encoding.archive.model import GROUP, SUPER, Lists, Model
from potstill.cache.encoding.archive.range_coder import FAILED, Coder, compiled, peek, take, write


@compiled
def count_novel(model: Model, rank: int) -> None:
    """Exclude a novel rank for the rest of the stage; `_close_stage` then counts it."""
    frequency = model.frequency[rank]
    model.open_groups[rank >> GROUP] -= frequency
    model.open_supers[rank >> SUPER] -= frequency
    model.open_supers[len(model.open_supers) - 1] -= frequency
    counted = len(model.novel) - 2
    model.novel[model.novel[counted]] = rank
    model.novel[counted] += 1


@compiled
def open_frequencies(lists: Lists, model: Model, first: int, begin: int, count: int) -> None:
    """Sum, once in a stage, the frequencies of all ranks but its candidates and those the list has already."""
    opened = len(model.novel) - 1
    if model.novel[opened]:
        return
    model.novel[opened] = 1
    groups, supers = model.open_groups, model.open_supers
    for i in range(len(groups)):
        groups[i] = model.groups[i]
    for i in range(count):
        rank = model.candidates[i]
        groups[rank >> GROUP] -= model.frequency[rank]
    for entry in range(first, begin):
        rank = np.int64(lists.ids[entry])
        groups[rank >> GROUP] -= model.frequency[rank]
    supers[:] = 0
    last = len(supers) - 1
    for i in range(len(groups)):
        supers[i >> (SUPER - GROUP)] += groups[i]
    for i in range(last):
        supers[last] += supers[i]


@compiled
def _mass_below(model: Model, rank: int) -> int:
    """Sum of the frequencies of ranks below `rank` that are not excluded."""
    mass = np.int64(0)
    for i in range(rank >> SUPER):
        mass += model.open_supers[i]
    for i in range((rank >> SUPER) << (SUPER - GROUP), rank >> GROUP):
        mass += model.open_groups[i]
    for i in range((rank >> GROUP) << GROUP, rank):
        if model.kind[i] == 0:
            mass += model.frequency[i]
    return mass


@compiled
def _find_mass(model: Model, mass: int) -> tuple[int, int]:
    """Rank, not excluded, at which the running sum of frequencies passes `mass`, and the sum before it."""
    before = np.int64(0)
    i = 0
    while i < len(model.open_supers) - 2 and before + model.open_supers[i] <= mass:
        before += model.open_supers[i]
        i += 1
    i <<= SUPER - GROUP
    while i < len(model.open_groups) - 1 and before + model.open_groups[i] <= mass:
        before += model.open_groups[i]
        i += 1
    i <<= GROUP
    while i < len(model.kind) - 1:
        if model.kind[i] == 0:
            if before + model.frequency[i] > mass:
                break
            before += model.frequency[i]
        i += 1
    return i, before


@compiled
def code_novel(coder: Coder, model: Model, rank: int, low_rank: int) -> int:
    """Code a rank above `low_rank` that is not excluded."""
    skipped = _mass_below(model, low_rank + 1)
    total = model.open_supers[len(model.open_supers) - 1] - skipped
    if total <= 0:
        coder.state[FAILED] = 1
        return 0
    if coder.decoding:
        rank, before = _find_mass(model, peek(coder, total) + skipped)
        take(coder, before - skipped, np.int64(model.frequency[rank]))
    else:
        before = _mass_below(model, rank)
        write(coder, before - skipped, np.int64(model.frequency[rank]), total)
    return rank
