"""Import of files of rows and targets: first the corpus, then each shard that has no commit yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus, IngestPlan, Source
from potstill.cache.corpus.ingest import ingest_rows
from potstill.cache.corpus.sources import file_sha256
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.corpus.tokenizer import fingerprint, num_ids
from potstill.cache.errors import SpecMismatch, UnknownCorpus
from potstill.cache.interchange.formats import Origin, RowFormat
from potstill.cache.interchange.parquet import ListColumns
from potstill.cache.interchange.row_files import RowFile, RowReader, came_from, placed
from potstill.cache.lineage import Handed, Step
from potstill.cache.plurals import counted
from potstill.cache.store.root import check_name
from potstill.cache.targets import TargetSet
from potstill.cache.types import Fields, Provenance, Targets, TeacherIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """Destination of an import, and the teacher whose targets it brings."""

    corpus: str
    teacher: str
    identity: TeacherIdentity
    fields: Fields
    encoding: str
    shard_positions: int | None = None
    """Positions of a shard, when the corpus is made (None: as fit it); one that exists keeps its shards."""
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """Texts of the files beside the tokenizer (`load_tokenizer_files`), for the corpus when it is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """Outcome of a finished import."""

    corpus_made: bool
    shards_written: int
    shards_before: int
    """Shards that had a commit when it began."""
    shards_absent: int
    """Shards without a commit whose rows the files do not hold, or not all of them."""


def import_targets(
    cache: Cache,
    files: Sequence[RowFile],
    form: RowFormat,
    tokenizer: Tokenizer,
    plan: ImportPlan,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ImportReport:
    """Make the corpus of the files' rows, or check that it has them, and commit every shard's targets.

    Memory holds one shard's targets. When it was stopped, the same call goes on with the shards without a commit.
    `on_progress` gets positions done and positions in all.

    Raises:
        InvalidInput: a row cannot be a teacher's answer; the error names its file.
        SpecMismatch: the corpus has other rows, the files come from another tokenizer or teacher, or the target set
            exists with another spec.
        StoreError: the cache cannot be written.
    """
    check_name("teacher", plan.teacher)
    _require_one_origin(files, fingerprint(tokenizer))
    corpus, made, files = _corpus(cache, files, form, tokenizer, plan)
    reader = RowReader(files, form)
    targets = cache.plan_targets(plan.teacher, corpus.name, plan.identity, fields=plan.fields, encoding=plan.encoding)
    rows, committed = corpus.shard_rows, targets.committed
    held = [s for s in range(corpus.num_shards) if reader.holds(int(rows[s]), int(rows[s + 1]))]
    todo = [shard for shard in held if not committed[shard]]
    _fill(targets, reader, todo, _provenances(corpus, files, form, todo), on_progress)
    return ImportReport(
        corpus_made=made,
        shards_written=len(todo),
        shards_before=int(committed.sum()),
        shards_absent=corpus.num_shards - len(set(held) | set(np.flatnonzero(committed).tolist())),
    )


def _fill(
    targets: TargetSet,
    reader: RowReader,
    todo: list[int],
    provenances: Sequence[Provenance],
    on_progress: Callable[[int, int], None],
) -> None:
    corpus = targets.corpus
    total, done = int(np.diff(corpus.shard_starts)[todo].sum()), 0
    if todo:
        _make_ranks(targets, reader)
    for shard, provenance in zip(todo, provenances, strict=True):
        blocks = []
        start, stop = (int(row) for row in corpus.shard_rows[shard : shard + 2])
        for block in reader.targets(start, stop):
            blocks.append(block)
            done += block.num_positions
            on_progress(done, total)
        targets.write_shard(shard, Targets.concat(blocks), provenance)
    targets.fold()


def _make_ranks(targets: TargetSet, reader: RowReader) -> None:
    """Make the rank table, from those pilot rows that the files hold."""
    wanted = [row for row in targets.pilot_rows() if reader.holds(row, row + 1)]
    if wanted:
        targets.make_ranks(Targets.concat([part for row in sorted(wanted) for part in reader.targets(row, row + 1)]))


def _corpus(
    cache: Cache, files: Sequence[RowFile], form: RowFormat, tokenizer: Tokenizer, plan: ImportPlan
) -> tuple[Corpus, bool, Sequence[RowFile]]:
    """The corpus, True where it was made just now, and the files with their places in it."""
    # A first pass over all files: the longest row has to be known before a corpus is written.
    longest = _check_tokens(RowReader(files, form), tokenizer)
    try:
        corpus = cache.corpus(plan.corpus)
    except UnknownCorpus:
        ingest = IngestPlan(row_tokens=longest, shard_positions=plan.shard_positions)
        sources = tuple(Source(name=f.path.name, sha256=file_sha256(f.path), documents=f.num_rows) for f in files)
        rows = _each_row(RowReader(files, form))
        made = ingest_rows(
            cache.root,
            plan.corpus,
            rows,
            tokenizer,
            ingest,
            sources=sources,
            tokenizer_files=plan.tokenizer_files,
        )
        return made, True, files
    files = _at_rows_of(corpus, files)
    _require_same_rows(corpus, RowReader(files, form), tokenizer)
    return corpus, False, files


def _at_rows_of(corpus: Corpus, files: Sequence[RowFile]) -> Sequence[RowFile]:
    if came_from(files, corpus.fingerprint):
        return placed(files)
    count = sum(file.num_rows for file in files)
    if count != len(corpus):
        raise SpecMismatch(
            f"corpus {corpus.name!r} has {counted(len(corpus), 'row')}, the files have {count:,}; "
            "import into another corpus"
        )
    return files


def _check_tokens(reader: RowReader, tokenizer: Tokenizer) -> int:
    """Check every token, and return the length of the longest row.

    Raises:
        InvalidInput: a token id is not one of the tokenizer's.
    """
    vocab_size = num_ids(tokenizer)
    longest = 1
    for source, _, rows in reader.rows():
        must = f"is outside the tokenizer's {vocab_size} ids; give the --tokenizer that made these rows"
        tokens = rows.tokens
        source.refuse_positions(tokens >= vocab_size, rows.lengths, lambda at: f"token id {tokens[at]} {must}")  # noqa: B023
        longest = max(longest, int(rows.lengths.max()))
    return longest


def _each_row(reader: RowReader) -> Iterator[SourceRow]:
    for _, _, rows in reader.rows():
        stops = np.cumsum(rows.lengths).tolist()
        for index, (start, stop) in enumerate(pairwise([0, *stops])):
            yield SourceRow(
                rows.tokens[start:stop],
                taught=None if rows.loss_mask is None else rows.loss_mask[start:stop],
                ends_document=rows.ends_document is not None and bool(rows.ends_document[index]),
            )


def _require_same_rows(corpus: Corpus, reader: RowReader, tokenizer: Tokenizer) -> None:
    if corpus.tokenizer_sha256 != fingerprint(tokenizer):
        raise SpecMismatch(
            f"corpus {corpus.name!r} was made with tokenizer {corpus.tokenizer_sha256[:12]}, --tokenizer is "
            f"{fingerprint(tokenizer)[:12]}; import into another corpus"
        )
    for source, start, rows in reader.rows():
        starts = corpus.row_starts[start : start + len(rows.lengths) + 1]
        lengths = np.diff(starts)
        wrong = np.flatnonzero(lengths != rows.lengths)
        if not len(wrong):
            other = np.flatnonzero(corpus.tokens(int(starts[0]), int(starts[-1])) != rows.tokens)
            wrong = np.searchsorted(np.cumsum(lengths), other[:1], side="right")
        if len(wrong):
            raise SpecMismatch(
                f"{source.path} row {source.first_row + int(wrong[0])} is not row {start + int(wrong[0])} of corpus "
                f"{corpus.name!r}; import into another corpus"
            )
        masked = None if rows.loss_mask is None else corpus.loss_mask(int(starts[0]), int(starts[-1]))
        if masked is not None and len(other := np.flatnonzero(masked != rows.loss_mask)):
            row = int(np.searchsorted(np.cumsum(lengths), other[0], side="right"))
            raise SpecMismatch(
                f"{source.path} row {source.first_row + row} has another loss mask than row {start + row} of corpus "
                f"{corpus.name!r}; import into another corpus, or take the column out to keep the corpus's"
            )


def _require_one_origin(files: Sequence[RowFile], tokenizer_sha256: str) -> None:
    first = files[0].origin
    for file in files:
        origin = file.origin
        if (origin is None) != (first is None):
            raise SpecMismatch(f"{file.path} and {files[0].path} are not of one export; import them one by one")
        if origin is None or first is None:
            continue
        if origin.corpus["tokenizer_sha256"] != tokenizer_sha256:
            raise SpecMismatch(
                f"{file.path} was made with tokenizer {str(origin.corpus['tokenizer_sha256'])[:12]}, --tokenizer is "
                f"{tokenizer_sha256[:12]}; give the one the rows were made with"
            )
        differences = first.identity.differences(origin.identity)
        if differences or first.fields != origin.fields or first.corpus != origin.corpus:
            raise SpecMismatch(
                f"{file.path} is of another export than {files[0].path} ({differences or 'corpus or fields differ'}); "
                "import them one by one"
            )


def _provenances(corpus: Corpus, files: Sequence[RowFile], form: RowFormat, shards: Sequence[int]) -> list[Provenance]:
    """Provenance for each shard: where several files give its rows, the one with the largest error bound."""
    made = [_provenance(file.origin, form) for file in files]
    spans = [(file.first_row, file.first_row + file.num_rows) for file in files]
    found = []
    for shard in shards:
        start, stop = corpus.shard_rows[shard : shard + 2].tolist()
        inside = (each for each, (first, end) in zip(made, spans, strict=True) if first < stop and end > start)
        found.append(max(inside, key=_furthest))
    return found


def _provenance(origin: Origin | None, form: RowFormat) -> Provenance:
    if origin is None:
        return Provenance(engine="unknown", engine_version="", device="", capture_path="", steps=(Step.imported(None),))
    # List columns have every number as it was; DistillKit's are an encoding of their own, without a bound.
    kept_as = origin.encoding if isinstance(form, ListColumns) else None
    return replace(origin.provenance, steps=(*origin.provenance.steps, Step.imported(kept_as)))


def _furthest(provenance: Provenance) -> float:
    error = Handed.after(provenance.steps).max_abs_error
    return math.inf if error is None else error
