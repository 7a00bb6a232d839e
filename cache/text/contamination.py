"""Items of benchmarks in the rows of a corpus, and the annotation that keeps these rows out of training.

The text of rows is decoded by document, so that what a cut parts is found, whoever wrote it: people or machines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.sources import file_sha256
from potstill.cache.errors import InvalidInput
from potstill.cache.text.benchmark_items import Item, read_items
from potstill.cache.text.item_index import LEAST_WORDS, ItemIndex, Match
from potstill.cache.text.row_texts import Window, batches, rows_of_words, text_of, windows, words_of

_SHOWN = 80
_MOST_NGRAM = 100


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark that was looked for, and how much of it was found."""

    name: str
    sha256: str
    items: int
    not_looked_for: int
    """Items with too few words, or only such that many items have."""
    found: int = 0
    with_answer: int = 0
    """Items of which some row has the answer beside the question."""
    rows: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """An item in a row."""

    row: int
    document: int
    benchmark: str
    item: int
    with_answer: bool
    question: str
    """Its beginning."""
    matched: str
    """Words of the corpus that are the item's, as they are compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Contamination:
    """Items that were found in a corpus."""

    benchmarks: tuple[Benchmark, ...]
    found: tuple[Found, ...]
    rows: NDArray[np.bool_]
    """[R] True for a row with an item, or a part of one."""
    ngram: int

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            "ngram": self.ngram,
            "least_words": LEAST_WORDS,
            "rows": len(self.rows),
            "rows_with_items": int(self.rows.sum()),
            "benchmarks": [asdict(each) for each in self.benchmarks],
            "found": [asdict(each) for each in self.found],
        }

    def provenance(self) -> dict[str, str]:
        """Texts that an annotation of the rows keeps."""
        told = self.to_json()
        del told["found"]
        names = ", ".join(each.name for each in self.benchmarks)
        return {"source": f"runs of {self.ngram} words of {names}", "report": json.dumps(told)}


def open_index(files: Sequence[Path], fields: Sequence[str] = (), ngram: int = 13) -> ItemIndex:
    """Read benchmark files, and index their items.

    Raises:
        InvalidInput: a file cannot be read or has an unknown shape, two have one name, `ngram` is out of range, or no
            item has enough words.
    """
    if not 1 <= ngram <= _MOST_NGRAM:
        raise InvalidInput(f"--ngram is {ngram}; it must be 1 to {_MOST_NGRAM}")
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        raise InvalidInput(f"two benchmarks are called {twice[0]!r}, and a report names them by it; rename one")
    items = [item for file in files for item in read_items(file, fields)]
    index = ItemIndex(items, ngram)
    if not index.num_runs:
        names = ", ".join(file.name for file in files)
        raise InvalidInput(
            f"no item of {names} has the {min(ngram, LEAST_WORDS)} words that are looked for, the "
            "question and an answer together; fewer are by a lower --ngram"
        )
    return index


def look_for(
    corpus: Corpus, files: Sequence[Path], index: ItemIndex, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Contamination:
    """Look for items in all rows of a corpus; `files` are those that the index was made of.

    `on_progress` is told of the rows that are done, and those with items.
    """
    flagged = np.zeros(len(corpus), np.bool_)
    found: dict[tuple[int, int], Found] = {}
    tokenizer = corpus.tokenizer
    for batch in batches(windows(corpus)):
        texts = words_of(tokenizer, [window.ids() for window in batch])
        for window, words in zip(batch, texts, strict=True):
            matches = list(index.find(words))
            if matches:
                spans = rows_of_words(tokenizer, window, words)
                _note(found, index.items, window, matches, spans, text_of(tokenizer, window).split())
        on_progress(batch[-1].first_row + len(batch[-1].rows), len({row for row, _ in found}))
    flagged[[row for row, _ in found]] = True
    benchmarks = tuple(_benchmark(file, index, found) for file in files)
    return Contamination(benchmarks, tuple(sorted(found.values())), flagged, index.n)


def _note(
    found: dict[tuple[int, int], Found],
    items: Sequence[Item],
    window: Window,
    matches: Sequence[Match],
    spans: NDArray[np.int64],
    words: Sequence[str],
) -> None:
    """Note the rows, with the words `spans` [R, 2] of the window's `words`, that matches lie in."""
    for match in matches:
        item, matched = items[match.item], " ".join(words[match.start : match.stop])
        for row in np.flatnonzero((spans[:, 0] < match.stop) & (spans[:, 1] > match.start)).tolist():
            key = (window.first_row + row, match.item)
            if key not in found or (match.with_answer and not found[key].with_answer):
                shown = (text[:_SHOWN] for text in (" ".join(item.question.split()), matched))
                found[key] = Found(key[0], window.document, item.benchmark, item.number, match.with_answer, *shown)


def _benchmark(file: Path, index: ItemIndex, found: Mapping[tuple[int, int], Found]) -> Benchmark:
    mine = [each for each in found.values() if each.benchmark == file.name]
    return Benchmark(
        name=file.name,
        sha256=file_sha256(file),
        items=sum(item.benchmark == file.name for item in index.items),
        not_looked_for=sum(index.items[number].benchmark == file.name for number in index.not_looked_for),
        found=len({each.item for each in mine}),
        with_answer=len({each.item for each in mine if each.with_answer}),
        rows=len({each.row for each in mine}),
    )
