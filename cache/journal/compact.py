"""Compaction: makes a sealed corpus with committed targets of a teacher's journal.

Rows that the journal keeps with K entries, from all processes and each once, become a corpus. Their stored arrays are
copied into a target set without decoding, only ids become ranks, so that every answer keeps its bits. Then the
segments whose rows are all in the corpus are removed. Rows with more entries are copied cut to K (encoded again, so
their tail is rounded a second time, see `journal.copy`) and stay in the journal too; rows with fewer only stay there.

When it was stopped, the same call goes on: a corpus that is sealed already is used as long as the journal holds the
rows of its uncommitted shards. Nothing is removed before all of them are committed and every byte of them was compared
with its record. Services keep answering, and find the corpus when they miss a segment. Memory holds one shard's targets
and 40 bytes for each row of the journal.

Shape legend:  R rows, K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus, IngestPlan, Source
from potstill.cache.corpus.ingest import ingest_rows
from potstill.cache.corpus.tokenizer import fingerprint, num_ids
from potstill.cache.encoding import RankTable
from potstill.cache.errors import AlreadyExists, CorruptSegment, FormatError, InvalidInput, SpecMismatch, StoreError
from potstill.cache.journal.copy import copy_rows
from potstill.cache.journal.journal import CLAIMS
from potstill.cache.journal.rows import JournalRows, first_rows, tokens_of
from potstill.cache.journal.segment import JournalSegment, SegmentRecord, journal_records
from potstill.cache.store import Claims
from potstill.cache.store.root import check_name
from potstill.cache.targets import SegmentSet, TargetSet
from potstill.cache.targets.segment import EncodedSegment
from potstill.cache.types import Fields, TeacherIdentity

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactPlan:
    """Choice of the rows, and of the corpus that they become.

    Raises:
        InvalidInput: k is below 1, or a name cannot be used.
    """

    teacher: str
    corpus: str
    k: int | None = None
    """Entries of the target set; None when all rows of the journal have the same K."""
    tokenizer: Tokenizer | None = None
    """The teacher's tokenizer; None when a corpus of the cache has it."""
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """Texts of the files beside that tokenizer (`load_tokenizer_files`)."""
    keep_journal: bool = False
    shard_positions: int | None = None

    def __post_init__(self) -> None:
        check_name("teacher", self.teacher)
        check_name("corpus", self.corpus)
        if self.k is not None and self.k < 1:
            raise InvalidInput(f"--top-k is {self.k}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """Outcome of a finished compaction."""

    corpus: Corpus
    corpus_made: bool
    k: int
    encoding: str
    shards_written: int
    shards_before: int
    """Shards that had a commit when it began."""
    segments_removed: int
    bytes_removed: int
    segments_left: int
    """Segments of this teacher that stay: of other identities, of other K, or with rows that came in meanwhile."""


def compact(
    cache: Cache, plan: CompactPlan, *, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> CompactReport:
    """Make the corpus, commit its targets, and remove from the journal the segments whose rows are all in it.

    `on_progress` gets positions done and positions in all.

    Raises:
        NotFound: the journal keeps no row of the teacher, or none with so many entries.
        InvalidInput: rows have several K and none was chosen, no corpus has the tokenizer, or the cache is read-only.
        SpecMismatch: the tokenizer is not the teacher's, the corpus holds rows that the journal does not, or the target
            set exists with another spec or more fields.
        CorruptSegment: a journal segment, or what was made of it, is damaged; nothing was removed.
        StoreError: the cache cannot be written.
    """
    if cache.mode != "r+":
        raise InvalidInput(f"cache {cache.root.url!r} was opened to read; open it with mode 'r+' to write")
    with Claims(cache.root, CLAIMS) as claims:
        # While the claim is held no service joins segments, which would mix these rows with new ones. Without it the
        # work is only less tidy: `retry_if_moved` finds rows that moved.
        name = f"journal-{plan.teacher}"
        if name not in claims.busy():
            claims.take(name)
        source = JournalRows.open(cache.root, plan.teacher, plan.k)
        corpus, made = _corpus(cache, source, plan)
        targets = _plan_targets(cache, source, plan.teacher, corpus)
        committed = targets.committed
        todo = [int(shard) for shard in np.flatnonzero(~committed)]
        if todo and not made:
            _require_held(corpus, source, todo)
        _fill(targets, source, todo, on_progress)
        if not plan.keep_journal:
            _require_intact(cache, plan.teacher, corpus.name)
        removed = [] if plan.keep_journal else _remove(corpus, source)
    return CompactReport(
        corpus=corpus,
        corpus_made=made,
        k=source.k,
        encoding=source.encoding.name,
        shards_written=len(todo),
        shards_before=int(committed.sum()),
        segments_removed=len(removed),
        bytes_removed=sum(record.num_bytes for record in removed),
        segments_left=len(journal_records(cache.root, plan.teacher)),
    )


def _plan_targets(cache: Cache, source: JournalRows, teacher: str, corpus: Corpus) -> TargetSet:
    """The target set to fill, which keeps nothing but the top-k that the journal has."""
    fields = Fields(k=source.k)
    targets = cache.plan_targets(teacher, corpus.name, source.identity, fields=fields, encoding=source.encoding.name)
    if targets.fields != fields:
        raise SpecMismatch(
            f"targets of {teacher!r} for corpus {corpus.name!r} also keep fields that the journal does not; "
            "compact into another --corpus"
        )
    return targets


def _corpus(cache: Cache, source: JournalRows, plan: CompactPlan) -> tuple[Corpus, bool]:
    """The corpus, and True where it was made just now."""
    if plan.corpus in cache.corpora():
        return cache.corpus(plan.corpus), False
    tokenizer, files = _tokenizer(cache, source.identity, plan)

    def make() -> Corpus:
        first, longest = first_rows(source)
        ingest = IngestPlan(row_tokens=longest, shard_positions=plan.shard_positions)
        came_from = (Source(name=f"journal of {plan.teacher}", sha256="", documents=sum(len(r) for _, r in first)),)
        rows = tokens_of(first, num_ids(tokenizer))
        return ingest_rows(cache.root, plan.corpus, rows, tokenizer, ingest, sources=came_from, tokenizer_files=files)

    try:
        return source.retry_if_moved(make), True
    except AlreadyExists:
        return cache.corpus(plan.corpus), False


def _tokenizer(cache: Cache, identity: TeacherIdentity, plan: CompactPlan) -> tuple[Tokenizer, Mapping[str, str]]:
    """The teacher's tokenizer, and the files beside it."""
    wanted = identity.tokenizer_sha256
    if plan.tokenizer is not None:
        if fingerprint(plan.tokenizer) != wanted:
            raise SpecMismatch(
                f"--tokenizer is {fingerprint(plan.tokenizer)[:12]}, teacher {plan.teacher!r} has {wanted[:12]}; "
                "give the teacher's own"
            )
        return plan.tokenizer, plan.tokenizer_files
    seen = cache.look_at_corpora(cache.corpus)
    for corpus in seen.found.values():
        if corpus.tokenizer_sha256 == wanted:
            return corpus.tokenizer, corpus.tokenizer_files
    told = "".join(f"; {name} cannot be read: {error.detail}" for name, error in seen.unreadable.items())
    raise InvalidInput(
        f"no corpus in {cache.root.url} has the tokenizer {wanted[:12]} of teacher {plan.teacher!r}; "
        f"give it with --tokenizer{told}"
    )


def _require_held(corpus: Corpus, source: JournalRows, shards: Sequence[int]) -> None:
    """Refuse an existing corpus whose uncommitted rows the journal does not keep, before anything is written."""
    for shard in shards:
        for first, keys in _keys(corpus, *corpus.shard_rows[shard : shard + 2].tolist()):
            places = source.retry_if_moved(lambda keys=keys: source.locate(keys))  # type: ignore[misc]
            if None in places:
                row = first + places.index(None)
                raise SpecMismatch(
                    f"corpus {corpus.name!r} is there, and the journal does not keep its row {row} with {source.k} "
                    "entries; compact into another --corpus, or score what is missing with `potstill prefill`"
                )


def _fill(
    targets: TargetSet, source: JournalRows, todo: Sequence[int], on_progress: Callable[[int, int], None]
) -> None:
    corpus = targets.corpus
    total, done = int(np.diff(corpus.shard_starts)[list(todo)].sum()), 0
    pilot = targets.pilot_rows()
    if todo and pilot:
        keys = [corpus.row_keys(row, row + 1).tobytes() for row in pilot]
        targets.make_ranks(source.retry_if_moved(lambda: source.targets(keys)))
    (segments,) = targets.sets
    for shard in todo:
        _write_shard(segments, source, shard)
        done += int(np.diff(corpus.shard_starts[shard : shard + 2])[0])
        on_progress(done, total)
    targets.fold()


def _write_shard(segments: SegmentSet, source: JournalRows, shard: int) -> None:
    blocks = _keys(segments.corpus, *segments.corpus.shard_rows[shard : shard + 2].tolist())
    keys = [key for _, block in blocks for key in block]
    copied = source.retry_if_moved(lambda: copy_rows(source, keys))

    def ranked(ranks: RankTable) -> EncodedSegment:
        arrays = copied.segment.arrays
        ids = ranks.ranks_by_id[arrays["ids"]].astype(ranks.dtype)
        return replace(copied.segment, arrays={**arrays, "ids": ids})

    provenance = replace(source.provenance, steps=(*source.provenance.steps, copied.step))
    segments.write_encoded(shard, ranked, provenance)


def _require_intact(cache: Cache, teacher: str, corpus: str) -> None:
    """Read every byte that is to stand for the journal, as another process finds it: commits are not remembered.

    Raises:
        CorruptSegment: something is not what was committed. NotCommitted: a commit is gone.
    """
    fresh = cache.fresh()
    problems = fresh.corpus(corpus).corrupt_objects()
    for each in fresh.targets(teacher, corpus).top_k_only().sets:
        for shard in range(each.corpus.num_shards):
            problems += each.segments.group(shard).corrupt_objects()
            each.segments.open(shard)  # which compares the rank table
    if problems:
        raise CorruptSegment(f"{problems[0]}; nothing was removed from the journal")


def _remove(corpus: Corpus, source: JournalRows) -> list[SegmentRecord]:
    """Remove every segment of exactly K entries whose rows are all in the corpus."""
    source.index.refresh()
    removed = []
    for segment in source.segments():
        if segment.record.k == source.k and _holds_all(corpus, segment, source):
            source.index.remove(segment.record)
            removed.append(segment.record)
    return removed


def _holds_all(corpus: Corpus, segment: JournalSegment, source: JournalRows) -> bool:
    try:
        keys = [key.tobytes() for key in segment.row_keys()]
    except (CorruptSegment, FormatError, StoreError):
        losses = source.index.losses
        source.index.refresh()
        if losses == source.index.losses:
            raise
        return False  # a service joined or evicted it meanwhile
    return all(None not in corpus.find(keys[i : i + _ROWS_AT_ONCE]) for i in range(0, len(keys), _ROWS_AT_ONCE))


def _keys(corpus: Corpus, start: int, stop: int) -> Iterator[tuple[int, list[bytes]]]:
    """Read the keys of rows `start` to `stop` in blocks, each with its first row."""
    for first in range(start, stop, _ROWS_AT_ONCE):
        block = corpus.row_keys(first, min(first + _ROWS_AT_ONCE, stop))
        yield first, [key.tobytes() for key in block]
