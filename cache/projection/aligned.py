"""Targets of the student's rows from those of the teacher that are at the same places of the text.

Shape legend:  n positions of the student's rows, m positions of the teacher's.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import NotCommitted
from potstill.cache.projection.axis import TextAxis
from potstill.cache.projection.first_tokens import FirstTokens
from potstill.cache.projection.kernels import Made, Taught, Wanted, path_logprobs, project_rows, sum_staying
from potstill.cache.projection.spelling import NONE
from potstill.cache.projection.tally import Tally
from potstill.cache.targets import TargetSet
from potstill.cache.types import Fields, Targets

_SPANS, _SPAN = 16, 8192
"""Spans of the teacher's positions that are looked at before the others, and how long they are."""
_MOST_CHUNK_TOKENS = 2048
"""Tokens of a chunk that float16 counts exactly."""


@dataclass(frozen=True, slots=True, eq=False)
class Projector:
    """Makes the student's targets of any rows."""

    student: TextAxis
    teacher: TextAxis
    source: TargetSet
    """The teacher's targets of its own corpus."""
    first: FirstTokens
    vocab_size: int
    """Of the student."""
    categories: NDArray[np.int64]
    """[vocab_size] of the student's ids."""

    @property
    def k(self) -> int:
        """Entries kept at a position."""
        return min(self.source.fields.k, self.vocab_size)

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """Find the teacher's positions that the student's from `start` to `stop` need."""
        _, ends = self.student.place(start, min(stop + 1, self.student.corpus.num_positions))
        first = self.teacher.first_ending_at(int(ends[0]))
        # What the last one covers, and what may follow it.
        last = self.teacher.first_ending_at(int(ends[-1])) + 2
        return first, max(min(last, self.teacher.corpus.num_positions), first)

    def require_committed(self, start: int, stop: int) -> None:
        """Check that the teacher's targets for the student's positions are there.

        Raises:
            NotCommitted: they are not.
        """
        first, last = self.range_of(start, stop)
        starts = self.source.corpus.shard_starts
        shards = slice(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, last)))
        if not self.source.committed[shards].all():
            raise NotCommitted(f"teacher {self.source.teacher!r} lacks targets of corpus {self.source.corpus.name!r}")

    def project(self, start_row: int, stop_row: int, tally: Tally) -> Targets:
        """Make the targets of rows, and count in `tally` what aligned.

        Raises:
            NotCommitted, CorruptSegment: the teacher's cannot be read.
        """
        starts = self.student.corpus.starts(start_row, stop_row)
        start, stop = int(starts[0]), int(starts[-1])
        taught = self._taught(*self.range_of(start, stop))
        wanted = self._wanted(starts, taught.ends[:-1])
        made = _empty(stop - start, self.k)
        project_rows(taught, self.first, wanted, self.vocab_size, made)
        self._count(taught, wanted, made, tally)
        chunks = _chunks(taught, wanted.places, np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
        alignment = np.column_stack([made.unresolved.clip(0.0, 1.0), *chunks]).astype(np.float32)
        return Targets(
            ids=made.ids,
            logprobs=made.logprobs,
            log_tail=made.log_tail,
            label_logprob=made.label_logprob,
            alignment=alignment,
        )

    def with_shares(self) -> Projector:
        """Learn of a sample of the text how much of each open id stays apart from what follows it.

        Where the teacher's text goes another way than the row, that is all that can be known of it. Ids that the sample
        lacks have the mean of the others.
        """
        sums = np.zeros((2, len(self.first.going_on)))
        if not sums.size:
            return self
        count = self.teacher.corpus.num_positions
        spans = min(_SPANS, -(-count // _SPAN))
        for start in (np.arange(spans) * count // spans).tolist():
            with suppress(NotCommitted):
                sum_staying(self._taught(start, min(start + _SPAN, count)), self.first, sums)
        seen, stayed = sums
        mean = stayed.sum() / seen.sum() if seen.sum() else 0.0
        stays = np.where(seen > 0, stayed / np.maximum(seen, 1), mean)
        return replace(self, first=self.first._replace(stays=stays))

    def _taught(self, first: int, last: int) -> Taught:
        """Read what the teacher says at its positions."""
        nexts, next_ends, ends = _following(self.teacher, first, last)
        answers = self._read(first, last)
        path = path_logprobs(answers.ids, answers.logprobs, answers.label_logprob, nexts)
        # The kernels take the end of the token after position t at t + 1.
        beyond = np.append(ends, next_ends[-1:] if len(ends) else ends)
        return Taught(answers.ids, answers.logprobs, answers.log_tail, nexts, beyond, path)

    def _read(self, first: int, last: int) -> Targets:
        if first == last:
            nothing = np.empty((0, self.source.fields.k), np.float32)
            no_tail = np.empty(0, np.float32)
            return Targets(ids=nothing.astype(np.uint32), logprobs=nothing, log_tail=no_tail, label_logprob=no_tail)
        return self.source.read(first, last, fields=Fields(k=self.source.fields.k))

    def _wanted(self, starts: NDArray[np.int64], teacher_ends: NDArray[np.int64]) -> Wanted:
        start, stop = int(starts[0]), int(starts[-1])
        nexts, next_ends, ends = _following(self.student, start, stop)
        tokens, _ = self.student.place(start, stop)
        has_label = np.ones(stop - start, dtype=np.bool_)
        has_label[starts[1:] - start - 1] = False
        at_start = self.student.begins_documents(start, tokens)
        return Wanted(_places(ends, teacher_ends), nexts, next_ends, at_start, has_label)

    def _count(self, taught: Taught, wanted: Wanted, made: Made, tally: Tally) -> None:
        at = np.flatnonzero(wanted.has_label)
        places, labels = wanted.places[at], wanted.nexts[at]
        aligned = places != NONE
        nexts = np.where(aligned, taught.nexts[places], NONE) if len(taught.nexts) else np.full_like(places, NONE)
        known = aligned & (nexts != NONE)
        same = known & (taught.ends[np.where(known, places, 0) + 1] == wanted.next_ends[at])
        agreeing = known & (self.first.inside[nexts] == labels)
        columns = np.stack([aligned, same, agreeing, 1.0 - made.unresolved[at]]).astype(np.float64)
        tally.add(self.categories[labels], columns)


def _empty(num_positions: int, k: int) -> Made:
    return Made(
        np.zeros((num_positions, k), np.uint32),
        np.zeros((num_positions, k), np.float32),
        np.zeros(num_positions, np.float32),
        np.zeros(num_positions, np.float32),
        np.zeros(num_positions),
    )


def _following(axis: TextAxis, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Next token of the document [n] and where it ends [n], `NONE` behind the last; and where each ends itself [n]."""
    if start == stop:
        none = np.empty(0, np.int64)
        return none, none, none
    more = min(stop + 1, axis.corpus.num_positions)
    tokens, ends = axis.place(start, more)
    documents = axis.documents_at(start, more)
    nexts, next_ends = np.full(stop - start, NONE), np.full(stop - start, NONE)
    there = np.flatnonzero(documents[1:] == documents[:-1])
    nexts[there], next_ends[there] = tokens[there + 1], ends[there + 1]
    return nexts, next_ends, ends[: stop - start]


def _places(ends: NDArray[np.int64], teacher_ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place [n] among the teacher's positions of each of the student's, by where their tokens end [n], [m].

    Tokens without a text end where others do: the last belongs to the last, the one before to the one before.
    """
    if not len(teacher_ends):
        return np.full(len(ends), NONE)
    last = np.searchsorted(teacher_ends, ends, side="right") - 1
    found = (last >= 0) & (teacher_ends[last] == ends)
    before = np.searchsorted(ends, ends, side="right") - 1 - np.arange(len(ends))
    earlier = np.maximum(last - before, 0)
    return np.where(found, np.where(teacher_ends[earlier] == ends, earlier, last), NONE)


def _chunks(
    taught: Taught, places: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The teacher's log-likelihood [n] of the chunk that ends with each position's next token, and its tokens [n].

    Both are 0 where none ends. A chunk is the text between two places that both have, in one row of the student's.
    """
    logprob, tokens = np.zeros(len(places)), np.zeros(len(places))
    common = np.flatnonzero(places != NONE)
    if len(common) < 2:
        return logprob, tokens
    begin, end = common[:-1], common[1:]
    unknown = ~np.isfinite(taught.path)
    sums = np.concatenate([[0.0], np.cumsum(np.where(unknown, 0.0, taught.path))])
    gaps = np.concatenate([[0], np.cumsum(unknown)])
    known = (gaps[places[end]] == gaps[places[begin]]) & (rows[begin] == rows[end]) & (places[end] > places[begin])
    known &= end - begin <= _MOST_CHUNK_TOKENS
    begin, end = begin[known], end[known]
    logprob[end - 1] = np.minimum(sums[places[end]] - sums[places[begin]], 0.0)
    tokens[end - 1] = end - begin
    return logprob, tokens
