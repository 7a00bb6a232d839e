"""Runs of words of benchmark items, sorted by their hashes, and the search for them in texts.

An item is looked for by every run of `n` words of its question and of its answers, also across the border of the two;
shorter ones of at least `LEAST_WORDS` as a whole. Runs that more than `MOST_SHARING` items have are a form of words and
no sign of one of them. A question's match is one with its answer where an answer stands near it.

Shape legend:  W words, E entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.benchmark_items import Item
from potstill.cache.text.words import ngram_hashes, normalised, word_hashes

LEAST_WORDS = 8
"""Words of the shortest question, with its answer where there is one, that is looked for."""
MOST_SHARING = 10
"""Items that may have a run of words in common, as in GPT-3's check."""
_NEAR = 50  # words around a question in which its answer is looked for
_SLOTS_PER_ENTRY = 8


@dataclass(frozen=True, slots=True)
class Match:
    """A run of words of a text that is one of an item."""

    item: int
    """Index among the items of the index."""
    with_answer: bool
    """The run is of an answer, or an answer stands near."""
    start: int
    """First word of the run, in the text."""
    stop: int


class ItemIndex:
    """Finds items in texts; memory is 12 bytes a run of words, and 8 to 16 for a table that rules most texts out."""

    def __init__(self, items: Sequence[Item], n: int = 13) -> None:
        self.items = items
        self.n = n
        self._questions: list[int] = []
        self._answers: list[list[NDArray[np.uint64]]] = []
        entries: defaultdict[int, list[tuple[NDArray[np.uint64], int]]] = defaultdict(list)
        for number, item in enumerate(items):
            for length, hashes, entry in self._runs(item, number):
                entries[length].append((hashes, entry))
        self._tables = {length: _Table.of(found) for length, found in entries.items()}
        looked_for = {entry >> 1 for table in self._tables.values() for entry in np.unique(table.entries).tolist()}
        self.not_looked_for = [number for number in range(len(items)) if number not in looked_for]
        """Items that have too few words, or only such that many items have."""

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(table.num_bytes for table in self._tables.values())

    @property
    def num_runs(self) -> int:
        """Number of runs of words that are looked for."""
        return sum(len(table.hashes) for table in self._tables.values())

    def find(self, words: NDArray[np.uint64]) -> Iterator[Match]:
        """Find items in a text, given as the hashes of its words [W]; an item may be found many times."""
        for length, table in self._tables.items():
            for start, entry in table.find(ngram_hashes(words, length)):
                item, of_answer = entry >> 1, bool(entry & 1)
                with_answer = of_answer or self._answer_near(words, item, start)
                yield Match(item, with_answer, start, start + length)

    def _runs(self, item: Item, number: int) -> Iterator[tuple[int, NDArray[np.uint64], int]]:
        """Runs of an item by their length, with hashes [E], and the item's number and what they are of as one."""
        question = word_hashes(normalised(item.question))
        answers = [word_hashes(normalised(answer)) for answer in item.answers]
        self._questions.append(len(question))
        self._answers.append([answer for answer in answers if len(answer)])
        around = [(question, 2 * number)]
        for answer in answers:
            # Beside those of the two, the runs across their border.
            across = np.concatenate([question[-(self.n - 1) :], answer[: self.n - 1]]) if self.n > 1 else answer
            around += [(answer, 2 * number + 1)] if len(answer) >= self.n else []
            around += [(across, 2 * number + 1)] if len(answer) and len(question) else []
        for words, entry in around:
            length = min(self.n, len(words))
            if length == self.n or length >= LEAST_WORDS:
                yield length, np.unique(ngram_hashes(words, length)), entry

    def _answer_near(self, words: NDArray[np.uint64], item: int, start: int) -> bool:
        near = words[max(0, start - _NEAR) : start + self._questions[item] + _NEAR]
        for answer in self._answers[item]:
            runs = ngram_hashes(near, len(answer))
            if len(runs) and (runs == ngram_hashes(answer, len(answer))[0]).any():
                return True
        return False


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Runs of one length."""

    hashes: NDArray[np.uint64]
    """[E], sorted."""
    entries: NDArray[np.uint32]
    """[E] what each is of."""
    may_be: NDArray[np.bool_]
    """[a power of two] by the last bits of a hash, whether some run has them: most runs of a text end here."""

    @classmethod
    def of(cls, found: list[tuple[NDArray[np.uint64], int]]) -> _Table:
        hashes = np.concatenate([each for each, _ in found])
        entries = np.repeat(np.array([entry for _, entry in found], np.uint32), [len(each) for each, _ in found])
        order = np.lexsort((entries, hashes))
        hashes, entries = hashes[order], entries[order]
        # What an item's question and several answers have is there once, as of the question.
        first = np.ones(len(hashes), np.bool_)
        first[1:] = (hashes[1:] != hashes[:-1]) | (entries[1:] >> 1 != entries[:-1] >> 1)
        hashes, entries = hashes[first], entries[first]
        sharing = np.searchsorted(hashes, hashes, side="right") - np.searchsorted(hashes, hashes, side="left")
        few = sharing <= MOST_SHARING
        hashes, entries = hashes[few], entries[few]
        may_be = np.zeros(1 << (_SLOTS_PER_ENTRY * len(hashes)).bit_length(), np.bool_)
        may_be[hashes & np.uint64(len(may_be) - 1)] = True
        return cls(hashes, entries, may_be)

    @property
    def num_bytes(self) -> int:
        return self.hashes.nbytes + self.entries.nbytes + self.may_be.nbytes

    def find(self, runs: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """Places and entries of runs of a text, [W]."""
        places = np.flatnonzero(self.may_be[runs & np.uint64(len(self.may_be) - 1)])
        first = np.searchsorted(self.hashes, runs[places], side="left")
        last = np.searchsorted(self.hashes, runs[places], side="right")
        for hit in np.flatnonzero(last > first):
            for entry in self.entries[first[hit] : last[hit]].tolist():
                yield int(places[hit]), entry
