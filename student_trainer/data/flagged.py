"""Rows that annotations of a corpus flag, neither trained nor evaluated on, such as those with items of benchmarks.

Shape legend:  F flagged rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.annotations import says_contaminated
from potstill.cache.errors import InvalidInput, NotFound


def flagged_rows(corpora: Sequence[Corpus], leave_out: Sequence[str] | None) -> list[NDArray[np.int64]]:
    """List the rows [F] of each corpus, rising, that annotations flag.

    Args:
        corpora: those to train on.
        leave_out: names of annotations; None for `contaminated` and all that begin with `contaminated-`.

    Raises:
        NotFound: no corpus has an annotation of a name. InvalidInput: one is not of bool.
    """
    there = [corpus.annotations() for corpus in corpora]
    for name in leave_out or ():
        if not any(name in names for names in there):
            known = ", ".join(sorted({each for names in there for each in names})) or "none"
            raise NotFound(f"data.leave_out has {name!r}, and no corpus has such an annotation; there are: {known}")
    chosen = says_contaminated if leave_out is None else leave_out.__contains__
    return [
        _flagged(corpus, [name for name in names if chosen(name)]) for corpus, names in zip(corpora, there, strict=True)
    ]


def _flagged(corpus: Corpus, names: Sequence[str]) -> NDArray[np.int64]:
    flags = np.zeros(len(corpus), np.bool_)
    for name in names:
        values = corpus.annotation(name)
        if values.dtype != np.bool_:
            raise InvalidInput(
                f"annotation {name!r} of corpus {corpus.name!r} is {values.dtype}, and rows are left out by bool; set "
                "data.leave_out to the names of those to use, or to []"
            )
        flags |= values
    return np.flatnonzero(flags)
