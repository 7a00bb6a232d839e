"""Who wrote the rows of a corpus, when, and as the answer to what.

Shape legend:  R rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus.sources.completions import prompt_hash
from potstill.cache.corpus.sources.documents import Completion
from potstill.cache.errors import LimitExceeded

WRITTEN_BY = "written_by"
"""Name of the annotation that has the place of a row's model among those of its record."""
WRITTEN_AT = "written_at"
PROMPT = "prompt_sha256"
ANNOTATIONS = (WRITTEN_BY, WRITTEN_AT, PROMPT)
"""Names of all that such a corpus has."""
_MOST_MODELS = 1000


@dataclass(slots=True)
class Author:
    """A model, how much of a corpus it wrote, and from when to when, in seconds since 1970."""

    name: str
    documents: int
    rows: int
    first: int
    last: int

    @property
    def period(self) -> str:
        """First and last day, in UTC."""
        first, last = (datetime.fromtimestamp(at, UTC).date().isoformat() for at in (self.first, self.last))
        return first if first == last else f"{first} to {last}"


class Authorship:
    """Takes what is known of the documents of a corpus, in order; 18 bytes a row."""

    def __init__(self) -> None:
        self.authors: dict[str, Author] = {}
        """By name, in the order in which they came."""
        self._places: dict[str, int] = {}
        self._models, self._times, self._prompts = array("H"), array("q"), array("Q")

    def add(self, document: Completion, rows: int) -> None:
        """Take a document of so many rows.

        Raises:
            LimitExceeded: there are too many models.
        """
        at = document.created
        author = self.authors.setdefault(document.model, Author(document.model, 0, 0, at, at))
        if len(self.authors) > _MOST_MODELS:
            raise LimitExceeded(
                f"{document.where} names model {_MOST_MODELS + 1}; a corpus is written by at most {_MOST_MODELS}: is "
                "'model' a name? part it, or make it one"
            )
        author.documents += 1
        author.rows += rows
        author.first, author.last = min(author.first, at), max(author.last, at)
        place = self._places.setdefault(document.model, len(self._places))
        self._models.extend([place] * rows)
        self._times.extend([at] * rows)
        self._prompts.extend([prompt_hash(document.prompt)] * rows)

    def in_words(self, most: int = 3) -> str:
        """The first models with their documents and days, and how many others."""
        some = islice(self.authors.values(), most)
        words = ", ".join(f"{each.name} ({each.documents:,}, {each.period})" for each in some)
        others = len(self.authors) - most
        return f"{words} and {others} others" if others > 0 else words

    def annotations(self) -> Iterator[tuple[str, NDArray[Any], dict[str, str]]]:
        """Yield name, values [R] and provenance of each annotation: models uint16, times int64, hashes uint64."""
        if not self.authors:
            return
        report = json.dumps({"models": [asdict(author) for author in self.authors.values()]})
        for name, values, dtype, meaning in (
            (WRITTEN_BY, self._models, np.uint16, "place among the models of the report"),
            (WRITTEN_AT, self._times, np.int64, "seconds since 1970"),
            (PROMPT, self._prompts, np.uint64, "first 8 bytes of the prompt's sha256, 0 without a prompt"),
        ):
            provenance = {"source": "potstill ingest --completions", "meaning": meaning}
            if name == WRITTEN_BY:
                provenance["report"] = report
            yield name, np.array(values, dtype), provenance


def authors_of(report: str) -> list[Author]:
    """Read the models of the record of `WRITTEN_BY`.

    Raises:
        ValueError, LookupError, TypeError: it is another's.
    """
    return [Author(**each) for each in json.loads(report)["models"]]
