"""What the coder of ranks knows, learns and works in; see `archive_ids`.

Shape legend:  p positions, U entries of all lists, V vocabulary size, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.range_coder import compiled

STAGES = (0, 3, 8)
LEADING = 8
CELLS = 8
"""Kinds of entries whose statistics are kept apart."""
CLASSES = 25
RATIOS = 1024
MAX_LENGTH = 2048
"""Longest list; keeps the sums of frequencies within what the coder takes."""
NO_RANK = 0xFFFFFFFF
NOVEL = CLASSES - 1
TIES = 10
SIMILARITY = 4
FOLLOWED = 8
NEAR = 3
VOTERS = 24
# Once with the same token, before and after 2 each, near by, by the label, and by each leading rank.
_MOST_SIMILAR = 1 + 2 + 2 + 1 + 1 + LEADING
USED = 255
ONE = 1024
GROUP, SUPER = 6, 12
FREQUENCY_LIMIT = 1 << 29


class Lists(NamedTuple):
    """What both sides know before the ranks, and the ranks themselves."""

    starts: NDArray[np.int64]
    """[p+1] where each list begins."""
    ids: NDArray[np.uint32]
    """[U] ranks: read when encoding, written when decoding."""
    votes: NDArray[np.int32]
    """[U] what the entry weighs as a vote at later positions, 1 to `max_vote`."""
    max_vote: int
    cells: NDArray[np.uint8]
    """[U] below `CELLS`."""
    tied: NDArray[np.uint8]
    """[U] 1 where the entry has no order to the one before it in its list."""
    depths: NDArray[np.int64]
    """[stages] how many entries of a voter's list vote."""
    classes: NDArray[np.uint8]
    """[RATIOS] the class of a share of the votes in 1/RATIOS; rising shares have falling classes, below C - 1."""


class Links(NamedTuple):
    """[p] each: the last earlier position of the block with the same token (and the same neighbour), -1 for none."""

    same: NDArray[np.int64]
    same_before: NDArray[np.int64]
    same_after: NDArray[np.int64]
    row_begins: NDArray[np.int64]
    """The first position of the row, or of the block."""
    labels: NDArray[np.int64]
    """The rank of the next token, -1 for none."""


class Model(NamedTuple):
    """What is learned, and room to work in."""

    hits: NDArray[np.int64]
    """[contexts, C] how often a class was right, in 1/32."""
    offers: NDArray[np.int64]
    """[contexts, C] how many candidates it had offered."""
    weights: NDArray[np.int64]
    """[contexts, C] of one candidate of a class, in 2**-16."""
    frequency: NDArray[np.int32]
    """[V] of ranks without a vote."""
    groups: NDArray[np.int32]
    """Sums of `frequency` over 64 ranks."""
    total: NDArray[np.int64]
    """[1] their sum."""
    open_groups: NDArray[np.int32]
    """The same without what is excluded in this stage."""
    open_supers: NDArray[np.int64]
    """Sums over 64 of these, and the sum of all last."""
    heads: NDArray[np.int64]
    """[V] the last leading entry with that rank."""
    chain: NDArray[np.int64]
    """[p * LEADING] the leading entry before this one with the same rank."""
    similarity: NDArray[np.int64]
    """[p] zero between stages."""
    score: NDArray[np.int32]
    """[V] zero between stages."""
    kind: NDArray[np.uint8]
    """[V] class + 1 of candidates, `USED` for what the list has already, 0 for others."""
    levels: NDArray[np.int64]
    """How many positions are that similar."""
    voters: NDArray[np.int64]
    candidates: NDArray[np.int64]
    members: NDArray[np.int64]
    """Candidates by class."""
    member_classes: NDArray[np.uint8]
    """The class of each of `candidates`."""
    begins: NDArray[np.int64]
    """[C + 1] of each class in `members`."""
    sizes: NDArray[np.int64]
    """[C] how many of them remain."""
    novel: NDArray[np.int64]
    """Ranks without a vote of this stage; how many, and whether the open sums are of this stage, come last."""
    keys: NDArray[np.int64]


def new_model(vocab_size: int, num_positions: int, longest: int) -> Model:
    """A model that has learned nothing."""
    contexts = len(STAGES) * SIMILARITY * CELLS * TIES
    hits = np.tile(np.maximum(16 >> (np.arange(CLASSES) // 4), 1), (contexts, 1)).astype(np.int64)
    hits[:, NOVEL] = 48
    offers = np.full((contexts, CLASSES), 512, dtype=np.int64)
    frequency = np.maximum(20 * ONE // (np.arange(vocab_size) + 50), 1).astype(np.int32)
    groups = np.add.reduceat(frequency, np.arange(0, vocab_size, 1 << GROUP)).astype(np.int32)
    room = VOTERS * longest
    return Model(
        hits=hits,
        offers=offers,
        weights=(hits << 16) // offers,
        frequency=frequency,
        groups=groups,
        total=frequency.sum(keepdims=True, dtype=np.int64),
        open_groups=groups.copy(),
        open_supers=np.zeros((len(groups) - 1 >> SUPER - GROUP) + 2, dtype=np.int64),
        novel=np.zeros(longest + 2, dtype=np.int64),
        heads=np.full(vocab_size, -1, dtype=np.int64),
        chain=np.full(num_positions * LEADING, -1, dtype=np.int64),
        similarity=np.zeros(num_positions, dtype=np.int64),
        score=np.zeros(vocab_size, dtype=np.int32),
        kind=np.zeros(vocab_size, dtype=np.uint8),
        levels=np.zeros(_MOST_SIMILAR + 1, dtype=np.int64),
        voters=np.zeros(4 * FOLLOWED + NEAR + LEADING * FOLLOWED, dtype=np.int64),
        candidates=np.zeros(room, dtype=np.int64),
        members=np.zeros(room, dtype=np.int64),
        member_classes=np.zeros(room, dtype=np.uint8),
        begins=np.zeros(CLASSES + 1, dtype=np.int64),
        sizes=np.zeros(CLASSES, dtype=np.int64),
        keys=np.zeros(longest, dtype=np.int64),
    )


@compiled
def learn(model: Model) -> None:
    """Weigh a candidate of a class by how often such were right."""
    for context in range(len(model.hits)):
        for c in range(CLASSES):
            model.weights[context, c] = max((model.hits[context, c] << 16) // model.offers[context, c], 1)
