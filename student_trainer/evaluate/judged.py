"""Rows that a student is judged by, and the judging: one pass over them, and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.cache.cache import Cache
from potstill.clients.http_targets import HttpCache
from potstill.student_trainer.data import BatchReader
from potstill.student_trainer.data.joined import JoinedCorpora
from potstill.student_trainer.evaluate.evidence import Evidence, evidence_of
from potstill.student_trainer.evaluate.labels import LabelTable
from potstill.student_trainer.evaluate.measuring import measure
from potstill.student_trainer.evaluate.sources import sources_of
from potstill.student_trainer.evaluate.whole_targets import whole_targets


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Some rows to judge a student by."""

    name: str
    """The corpus's, or `HELD_OUT`."""
    corpora: JoinedCorpora
    reader: BatchReader
    """Of rows of `corpora`, with the teachers to compare with."""
    rows: NDArray[np.int64]
    """[N] rising, at least one."""
    cache: Cache | HttpCache
    """Holds the corpora."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A student with the rows to judge it by."""

    name: str
    """The folder or hub name that was asked for."""
    model: PreTrainedModel
    """On its device."""
    dtype: str
    """Of its forward passes."""
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    """Loads the student's tokenizer with all its settings; raises InvalidInput."""
    judged: Sequence[Judged]
    """All of one tokenizer; none where the student is to be judged by tasks alone."""
    corpus: str | None = None
    """The corpus whose tokenizer is the student's, of a run."""

    @property
    def num_rows(self) -> int:
        """Rows of all together."""
        return sum(len(each.rows) for each in self.judged)


def judge(subject: Subject, on_progress: Callable[[int], None] = lambda _: None) -> dict[str, Evidence]:
    """Measure a student on all that it is to be judged by; the evidence by name.

    `on_progress` is called with the number of rows that are done.

    Raises:
        PotstillError: whatever reading rows and targets raises.
    """
    if not subject.judged:
        return {}
    labels = LabelTable.of(subject.judged[0].corpora.corpora[0].tokenizer)
    found: dict[str, Evidence] = {}
    before = 0
    for each in subject.judged:
        found[each.name] = _judged(subject, each, labels, partial(_more, on_progress, before))
        before += len(each.rows)
    return found


def _more(on_progress: Callable[[int], None], before: int, rows: int) -> None:
    on_progress(before + rows)


def _judged(subject: Subject, judged: Judged, labels: LabelTable, on_progress: Callable[[int], None]) -> Evidence:
    notes, whole = list(judged.notes), {}
    for source in judged.reader.sources:
        if not source.top_k:
            notes.append(
                f"teacher {source.name!r} is read as draws alone, so what needs a top-k was not measured; "
                "run `potstill prefill --top-k 64` for it"
            )
        targets, problem = whole_targets(judged.cache, source.name, judged.corpora)
        if targets is not None:
            whole[source.name] = targets
        else:
            notes.append(problem)
    sums = measure(
        subject.model, judged.reader, judged.rows, labels, whole, dtype=subject.dtype, on_progress=on_progress
    )
    sources = sources_of(judged.corpora, sums.documents)
    return evidence_of(sums, rows=len(judged.rows), labels=labels, sources=sources, notes=notes)
