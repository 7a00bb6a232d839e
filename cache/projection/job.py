"""The work of a projection: each shard of the student's corpus that has no commit yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, NotCommitted, UnsupportedField
from potstill.cache.lineage import Step
from potstill.cache.projection.aligned import Projector
from potstill.cache.projection.axis import BLOCK, TextAxis
from potstill.cache.projection.first_tokens import FirstTokens
from potstill.cache.projection.spelling import NONE, Spelling
from potstill.cache.projection.tally import Tally, categories_of
from potstill.cache.row_batches import row_batches
from potstill.cache.targets import TargetSet
from potstill.cache.types import Fields, Provenance, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionPlan:
    """Destination and source of a projection."""

    corpus: str
    """The student's corpus."""
    teacher: str
    source: str
    """The corpus of the same documents that the teacher has targets for."""
    encoding: str | None = None
    """How the projected targets are kept; None as the teacher's are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionReport:
    """Outcome of a projection."""

    shards_written: int
    shards_before: int
    """Shards that had a commit when it began."""
    shards_waiting: int
    """Shards that need targets which the teacher does not have yet."""
    tally: Tally
    """Counts of what aligned, in the shards that were written; where there was none to write, in those of before."""


def project(
    cache: Cache, plan: ProjectionPlan, *, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> ProjectionReport:
    """Make a teacher's targets of one corpus into targets of another with the same documents, and commit them.

    Memory holds one shard's targets. When it was stopped, the same call goes on with the shards without a commit; where
    none is left, it only tells again what aligned. `on_progress` gets positions done and positions in all.

    Raises:
        UnknownCorpus, UnknownTeacher: there is no such corpus, or the teacher has no targets for it.
        InvalidInput: both corpora are one.
        UnsupportedField: a tokenizer does not keep every byte, a corpus does not know its documents, or there is no
            top-k to project, or one that was itself projected.
        SpecMismatch: the corpora are not of the same documents, or the teacher has other targets for the student's.
        StoreError: the cache cannot be written.
    """
    source = _source(cache, plan)
    projector = _projector(cache, plan, source)
    corpus = projector.student.corpus
    identity = source.identity.projected(corpus.tokenizer_sha256, projector.vocab_size)
    targets = cache.plan_targets(
        plan.teacher,
        corpus.name,
        identity,
        fields=Fields(k=projector.k, alignment=True),
        encoding=plan.encoding or source.encoding.name,
    )
    committed, tally = targets.committed, Tally()
    todo = [shard for shard in np.flatnonzero(~committed).tolist() if _is_ready(projector, shard)]
    # Not while some wait: whoever asks again and again when they are there would have all made each time.
    told = todo or [shard for shard in range(len(committed)) if committed.all() and _is_ready(projector, shard)]
    total, done = int(np.diff(corpus.shard_starts)[told].sum()), 0
    if todo:
        _make_ranks(targets, projector)
    for shard in told:
        blocks = []
        for start, stop in row_batches(corpus.starts(*corpus.shard_rows[shard : shard + 2].tolist()), BLOCK):
            first = int(corpus.shard_rows[shard])
            blocks.append(projector.project(first + start, first + stop, tally))
            done += blocks[-1].num_positions
            on_progress(done, total)
        if todo:
            targets.write_shard(shard, Targets.concat(blocks), _provenance(projector, shard))
    targets.fold()
    return ProjectionReport(
        shards_written=len(todo),
        shards_before=int(committed.sum()),
        shards_waiting=corpus.num_shards - int(committed.sum()) - len(todo),
        tally=tally,
    )


def _source(cache: Cache, plan: ProjectionPlan) -> TargetSet:
    if plan.source == plan.corpus:
        raise InvalidInput(
            f"corpus {plan.corpus!r} is both; name the corpus that the teacher has targets for by --from"
        )
    found = cache.targets(plan.teacher, plan.source)
    if not found.fields.k:
        raise UnsupportedField(
            f"teacher {plan.teacher!r} has no top-k for corpus {plan.source!r}; prefill it with --top-k 64"
        )
    if found.fields.alignment:
        raise UnsupportedField(
            f"the targets of {plan.teacher!r} for corpus {plan.source!r} are projected themselves; name the corpus of "
            "the teacher's own tokenizer"
        )
    return found.top_k_only()


def _projector(cache: Cache, plan: ProjectionPlan, source: TargetSet) -> Projector:
    corpora = cache.corpus(plan.corpus), source.corpus
    for each in corpora:
        if each.spec.num_documents is None:
            raise UnsupportedField(
                f"corpus {each.name!r} does not say which row is of which document; ingest its text again"
            )
    spellings = [Spelling(each) for each in corpora]
    student, teacher = (TextAxis(*pair) for pair in zip(corpora, spellings, strict=True))
    student.require_same_documents(teacher)
    same = student.spelling.sha256 == teacher.spelling.sha256
    vocab_size = source.identity.vocab_size if same else corpora[0].vocab_size
    categories = np.resize(categories_of(student.spelling), vocab_size)
    first = _mapped(student, teacher, source, same=same)
    return Projector(student, teacher, source, first, vocab_size, categories).with_shares()


def _mapped(student: TextAxis, teacher: TextAxis, source: TargetSet, *, same: bool) -> FirstTokens:
    """Map all ids of the teacher's, those that its tokenizer does not have among them."""
    first = FirstTokens.of(student.spelling, teacher.spelling)
    ids = np.arange(source.identity.vocab_size)
    lost = source.unshared.holds(ids.astype(np.uint32))

    def longer(values: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(ids), NONE)
        found[: len(values)] = values[: len(ids)]
        found[lost] = NONE
        return found

    return first._replace(
        inside=ids if same else longer(first.inside),
        at_start=ids if same else longer(first.at_start),
        opening=longer(first.opening),
        first_bytes=longer(first.first_bytes),
    )


def _is_ready(projector: Projector, shard: int) -> bool:
    try:
        projector.require_committed(*projector.student.corpus.shard_starts[shard : shard + 2].tolist())
    except NotCommitted:
        return False
    return True


def _make_ranks(targets: TargetSet, projector: Projector) -> None:
    """Make the rank table, from those pilot rows for which the teacher has targets."""
    pilot = []
    for row in targets.pilot_rows():
        try:
            pilot.append(projector.project(row, row + 1, Tally()))
        except NotCommitted:
            continue
    if pilot:
        targets.make_ranks(Targets.concat(pilot))


def _provenance(projector: Projector, shard: int) -> Provenance:
    """Take over the provenance of the teacher's first shard that was projected into this one."""
    first, _ = projector.range_of(*projector.student.corpus.shard_starts[shard : shard + 2].tolist())
    source = projector.source
    theirs = int(np.searchsorted(source.corpus.shard_starts, first, side="right")) - 1
    made = source.commits_of([min(theirs, source.corpus.num_shards - 1)], Fields(k=source.fields.k))[0].provenance
    path = f"{made.capture_path}, projected from corpus {source.corpus.name}"
    return replace(made, capture_path=path, steps=(*made.steps, Step.projected()))
