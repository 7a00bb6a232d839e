"""Measures of a text, in the terms of Gopher (arXiv 2112.11446) and FineWeb (arXiv 2406.17557).

A measure that a text does not have, as the share of its lines where it has none, is left out.

Shape legend:  W words, M words without case and punctuation, N words of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterator

import numpy as np
from numpy.typing import NDArray

from potstill.cache.text.characters import ALONE, LETTER, SPACE, kinds
from potstill.cache.text.words import ngram_hashes

MEASURES = {
    "words": "words, between spaces; each letter of Chinese, Japanese or Thai is one",
    "mean_word_length": "characters a word",
    "symbols": "number signs and ellipses, a word",
    "alphabetic_words": "share of words with a letter",
    "stop_words": "different stop words of the text's language",
    "bullet_lines": "share of lines that begin with a bullet",
    "ellipsis_lines": "share of lines that end with an ellipsis",
    "punctuated_lines": "share of lines that end with a mark that ends a sentence",
    "short_lines": "share of lines of up to 30 characters",
    "duplicate_lines": "share of lines that are equal to an earlier one",
    "duplicate_line_characters": "share of characters in them",
    "duplicate_paragraphs": "share of paragraphs that are equal to an earlier one",
    "duplicate_paragraph_characters": "share of characters in them",
    **{f"top_{n}_gram": f"share of characters in the most frequent run of {n} words" for n in (2, 3, 4)},
    **{f"duplicate_{n}_grams": f"share of characters in runs of {n} words that stood before" for n in range(5, 11)},
}
"""Names of all measures, with what each is."""
_BULLETS = ("•", "‣", "◦", "▪", "●", "·", "- ", "* ", "+ ")
_ELLIPSES = ("…", "...")
_ENDS = tuple(".!?…。！？｡।؟۔\"'”’»」』")
_SHORT = 30


def measures(
    text: str, words: NDArray[np.uint64], lengths: NDArray[np.int64], stop: Collection[int], wanted: Container[str]
) -> dict[str, float]:
    """Measure a text; the values of those that are wanted, by the names of `MEASURES`.

    Args:
        text: any text.
        words: [M] hashes of its words without case and punctuation (`word_hashes`).
        lengths: [M] their lengths.
        stop: hashes of the stop words of its language; without any there is no measure of them.
        wanted: names.
    """
    found = dict(_of_words(text))
    if stop:
        found["stop_words"] = float(np.isin(np.fromiter(stop, np.uint64), words).sum())
    found.update(_of_lines(text))
    found.update(_of_repeats(words, lengths, wanted))
    return {name: value for name, value in found.items() if name in wanted}


def _of_words(text: str) -> Iterator[tuple[str, float]]:
    kind = kinds(text)
    inside = (kind & SPACE) == 0
    alone = (kind & ALONE) != 0
    begins = inside.copy()
    begins[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
    starts = np.flatnonzero(begins)
    yield "words", float(len(starts))
    if not len(starts):
        return
    spaced = ~alone[starts]
    if 2 * spaced.sum() >= len(starts):  # else words have no lengths to speak of
        lengths = np.add.reduceat(inside, starts, dtype=np.int64)
        yield "mean_word_length", float(lengths[spaced].mean())
    yield "symbols", (text.count("#") + text.count("...") + text.count("…")) / len(starts)
    yield "alphabetic_words", float(np.logical_or.reduceat((kind & LETTER) != 0, starts).mean())


def _of_lines(text: str) -> Iterator[tuple[str, float]]:
    lines = [line for each in text.splitlines() if (line := each.strip())]
    if not lines:
        return
    yield "bullet_lines", sum(line.startswith(_BULLETS) for line in lines) / len(lines)
    yield "ellipsis_lines", sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)
    yield "punctuated_lines", sum(line.endswith(_ENDS) for line in lines) / len(lines)
    yield "short_lines", sum(len(line) <= _SHORT for line in lines) / len(lines)
    yield from _duplicates("line", lines)
    yield from _duplicates("paragraph", [part for each in text.split("\n\n") if (part := each.strip())])


def _duplicates(name: str, parts: list[str]) -> Iterator[tuple[str, float]]:
    counts = Counter(parts)
    yield f"duplicate_{name}s", 1 - len(counts) / len(parts)
    yield f"duplicate_{name}_characters", 1 - sum(map(len, counts)) / sum(map(len, parts))


def _of_repeats(
    words: NDArray[np.uint64], lengths: NDArray[np.int64], wanted: Container[str]
) -> Iterator[tuple[str, float]]:
    """Shares of the characters of words [M]; lengths [M]."""
    total = int(lengths.sum())
    if not total:
        return
    ends = np.concatenate([[0], np.cumsum(lengths)])
    repeated = True
    for n in (n for n in range(2, 11) if f"top_{n}_gram" in wanted or f"duplicate_{n}_grams" in wanted):
        # Where no run of n words is repeated, none of more is.
        hashes = ngram_hashes(words, n) if repeated else np.empty(0, np.uint64)
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        repeated = len(first) < len(hashes)
        if n < 5:
            yield f"top_{n}_gram", _share_of_top(ends, first, counts, n) if repeated else 0.0
        else:
            later = np.ones(len(hashes), np.bool_)
            later[first] = False
            yield f"duplicate_{n}_grams", float(lengths[_covered(later, n, len(words))].sum()) / total


def _share_of_top(ends: NDArray[np.int64], first: NDArray[np.int64], counts: NDArray[np.int64], n: int) -> float:
    top = counts.argmax()
    size = int(ends[first[top] + n] - ends[first[top]])
    return min(1.0, size * int(counts[top]) / int(ends[-1]))


def _covered(starts: NDArray[np.bool_], n: int, words: int) -> NDArray[np.bool_]:
    """Tell which words [M] are in a run of n words that starts where `starts` says."""
    steps = np.zeros(words + 1, np.int64)
    places = np.flatnonzero(starts)
    np.add.at(steps, places, 1)
    np.add.at(steps, places + n, -1)
    return np.cumsum(steps)[:-1] > 0
