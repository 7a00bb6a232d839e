"""Arrays of the coder of ranks (`archive.ids`): its input, what it has learned, and its working memory.

Shape legend:  p positions, U entries of all lists, V vocabulary size, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.range_coder import compiled

# Entries of a list before which candidates are collected anew.
STAGES = (0, 3, 8)
# First ranks of a list by which later positions find it.
LEADING = 8
CELLS = 8
"""Kinds of entries whose statistics are kept apart."""
CLASSES = 25
RATIOS = 1024
NO_RANK = 0xFFFFFFFF
NOVEL = CLASSES - 1
TIES = 10
SIMILARITY = 4
# Links that are followed from a position, tokens back in the row that count as near, and positions whose lists vote:
# these bound the time for a position.
FOLLOWED = 8
NEAR = 3
VOTERS = 24
# Largest similarity: 1 for the same token, 2 each for the token before and after, 1 for being near, 1 by the label, and
# 1 for each leading rank.
_MOST_SIMILAR = 1 + 2 + 2 + 1 + 1 + LEADING
USED = 255
ONE = 1024
# Bits of a rank within a group and a super-group: a sum over a large vocabulary is three short loops.
GROUP, SUPER = 6, 12
# Frequencies stop growing here, below the coder's `MAX_TOTAL`.
FREQUENCY_LIMIT = 1 << 29


class Lists(NamedTuple):
    """The lists of ranks of all positions, and what encoder and decoder both know of them before."""

    starts: NDArray[np.int64]
    """[p+1] index at which each list begins, then U."""
    ids: NDArray[np.uint32]
    """[U] ranks: read when encoding, written when decoding."""
    votes: NDArray[np.int32]
    """[U] weight of the entry as a vote at later positions, 1 to `max_vote`."""
    max_vote: int
    cells: NDArray[np.uint8]
    """[U] kind of the entry, below `CELLS`."""
    tied: NDArray[np.uint8]
    """[U] 1 where the entry has no order to the one before it in its list."""
    depths: NDArray[np.int64]
    """[stages] number of entries of a voter's list that vote."""
    classes: NDArray[np.uint8]
    """[RATIOS] class of a share of the votes in 1/RATIOS; rising shares have falling classes, below C - 1."""


class Links(NamedTuple):
    """Last earlier position of the block with the same token (and the same neighbour), [p] each, -1 for none."""

    same: NDArray[np.int64]
    same_before: NDArray[np.int64]
    same_after: NDArray[np.int64]
    row_begins: NDArray[np.int64]
    """First position of the row, or of the block."""
    labels: NDArray[np.int64]
    """Rank of the next token, -1 for none."""


class Model(NamedTuple):
    """State that is learned, and working memory."""

    hits: NDArray[np.int64]
    """[contexts, C] times that a class was right, in 1/32."""
    offers: NDArray[np.int64]
    """[contexts, C] candidates that a class had offered, in 1/32."""
    weights: NDArray[np.int64]
    """[contexts, C] weight of one candidate of a class, in 2**-16."""
    frequency: NDArray[np.int32]
    """[V] frequency of each rank among novel ones (ranks without a vote)."""
    groups: NDArray[np.int32]
    """Sums of `frequency` over 64 ranks each."""
    total: NDArray[np.int64]
    """[1] sum of `frequency`."""
    open_groups: NDArray[np.int32]
    """`groups` without the ranks that are excluded in this stage."""
    open_supers: NDArray[np.int64]
    """Sums over 64 of `open_groups` each, and last the sum of all."""
    heads: NDArray[np.int64]
    """[V] last leading entry with this rank."""
    chain: NDArray[np.int64]
    """[p * LEADING] previous leading entry with the same rank."""
    similarity: NDArray[np.int64]
    """[p] similarity to the position in work; zero between stages."""
    score: NDArray[np.int32]
    """[V] sum of votes for each rank; zero between stages."""
    kind: NDArray[np.uint8]
    """[V] class + 1 of candidates, `USED` for ranks that the list has already, 0 for others."""
    levels: NDArray[np.int64]
    """Number of positions of each similarity."""
    voters: NDArray[np.int64]
    candidates: NDArray[np.int64]
    members: NDArray[np.int64]
    """Candidates ordered by class."""
    member_classes: NDArray[np.uint8]
    """Class of each of `candidates`."""
    begins: NDArray[np.int64]
    """[C + 1] index in `members` at which each class begins."""
    sizes: NDArray[np.int64]
    """[C] number of members of each class that remain."""
    novel: NDArray[np.int64]
    """Novel ranks of this stage; in the last two places, their number, and 1 once the open sums are made."""
    keys: NDArray[np.int64]


def new_model(vocab_size: int, num_positions: int, longest: int) -> Model:
    """Make a model that has learned nothing."""
    contexts = len(STAGES) * SIMILARITY * CELLS * TIES
    # What is assumed before anything is seen: candidates with a large share of the votes (low classes) are right more
    # often, and few ranks are novel.
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
    """Set the weight of a class' candidates to the share of them that were right."""
    for context in range(len(model.hits)):
        for c in range(CLASSES):
            model.weights[context, c] = max((model.hits[context, c] << 16) // model.offers[context, c], 1)
