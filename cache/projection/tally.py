"""Counts of what aligned, by the category of the student's next token."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from potstill.cache.projection.categories import CATEGORIES, SPECIAL, category_of
from potstill.cache.projection.spelling import Spelling

COLUMNS = ("positions", "aligned", "one_to_one", "agreeing", "resolved")
"""Positions with a next token; those at which the teacher has a boundary, too; those of them at which both have the
same next token; those at which the map gives the student's; and the mass that is known to be of one id or outside the
kept ones, summed over all positions."""
ALL = "all"


def categories_of(spelling: Spelling) -> NDArray[np.int64]:
    """Categories [V] of a tokenizer's ids."""
    found = np.array([category_of(data) for data in spelling.bytes_of], dtype=np.int64)
    found[list(spelling.special.values())] = SPECIAL
    return found


@dataclass(slots=True)
class Tally:
    """Sums of `COLUMNS` for each of `CATEGORIES`."""

    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(COLUMNS), len(CATEGORIES))))

    def add(self, category: NDArray[np.int64], columns: NDArray[np.float64]) -> None:
        """Add positions, of which all but the first of `COLUMNS` are given: [4, n]."""
        for row, values in enumerate([np.ones(len(category)), *columns]):
            self.sums[row] += np.bincount(category, values, minlength=len(CATEGORIES))

    @property
    def num_positions(self) -> int:
        """Positions with a next token."""
        return int(self.sums[0].sum())

    @property
    def resolved(self) -> float:
        """Share of the teacher's mass that is known to be of one id or outside the kept ones."""
        return float(self.sums[-1].sum() / max(self.sums[0].sum(), 1))

    def to_json(self) -> dict[str, dict[str, float]]:
        """Convert to shares by category, as of those that there are: `{"words": {"positions": 9, "aligned": 0.9}}`."""
        named = {ALL: self.sums.sum(axis=1), **dict(zip(CATEGORIES, self.sums.T, strict=True))}
        return {
            name: {"positions": int(sums[0]), **_shares(sums)} for name, sums in named.items() if name == ALL or sums[0]
        }


def _shares(sums: NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value / max(sums[0], 1)), 6) for name, value in zip(COLUMNS[1:], sums[1:], strict=True)}
