"""Choice of the rows that a page shows: what a student writes there, and what it and its teachers expect."""

from __future__ import annotations

from potstill.student_trainer.evaluate.judged import Judged, Subject
from potstill.student_trainer.evaluate.samples import Sample, Writing, samples, writings

_ROWS = 3
_LEAST_TOKENS = 4
_STUDENT = "student"


def texts_of(subject: Subject) -> tuple[list[Writing], list[Sample]]:
    """Have a student write on, and expect, at the first long rows of what it is judged by first.

    Raises:
        PotstillError: whatever reading targets raises.
    """
    if not subject.judged:
        return [], []
    judged = subject.judged[0]
    corpus, rows = judged.corpora.corpora[0], _long_rows(judged)
    if not rows:
        return [], []
    tokens, prefix = corpus.take(rows), judged.reader.prefix
    # Rows of the first corpus have the same numbers among those of all.
    targets = {source.name: source.read(rows, tokens) for source in judged.reader.sources}
    students = {_STUDENT: subject.model}
    return writings(corpus, rows, students, prefix), samples(corpus, rows, targets, students, prefix)


def _long_rows(judged: Judged) -> list[int]:
    """Up to three rows of the first corpus that are at least half as long as the longest of those judged by."""
    corpus = judged.corpora.corpora[0]
    rows = [int(row) for row in judged.rows if row < len(corpus)]
    lengths = {row: stop - start for row, (start, stop) in zip(rows, corpus.row_ranges(rows).tolist(), strict=True)}
    least = max(_LEAST_TOKENS, max(lengths.values(), default=0) // 2)
    return [row for row in rows if lengths[row] >= least][:_ROWS]
