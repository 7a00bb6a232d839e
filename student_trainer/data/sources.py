"""Sources of a student's targets: a cache, here or behind a service, or a running teacher. Rows in, targets out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import InvalidInput, NotCommitted, SpecMismatch, UnsupportedField
from potstill.cache.plurals import counted
from potstill.cache.targets import TargetSet
from potstill.cache.targets.names import require_one_identity
from potstill.cache.types import PROJECTED_FROM, Fields, Targets, TeacherIdentity, Tokens
from potstill.clients.address import key_in
from potstill.clients.http_targets import HttpCache, HttpTargets
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.student_trainer.data.needed import for_student, needed_of_cache, needed_of_service
from potstill.student_trainer.data.settings import DataConfig, Missing, TeacherConfig
from potstill.student_trainer.losses.settings import LossConfig

_PLAIN_LOSS = LossConfig()

NO_ID = np.iinfo(np.int32).max
"""An id over any vocabulary, whose mass joins the tail: for ids that the student does not share, and where a row has
fewer ids than others; a real one would be taken out of the student's tail."""


_DRAWS = 50
"""As many as the papers on sampled distillation take; a gradient's noise falls with their square root."""
_NORMALISED = ("u8", "archive")
"""Encodings whose decoded top-k is scaled to what the tail leaves, from codes that have no NaN."""


@dataclass(frozen=True, slots=True)
class TargetSource:
    """One teacher's targets of any rows of one corpus."""

    name: str
    """The teacher's, as the run's config has it."""
    identity: TeacherIdentity
    """The teacher's, as recorded in the cache or stated by the service."""
    held: str
    """K and encoding of what is read. A run goes on only with the same."""
    read: Callable[[Sequence[int], Sequence[Tokens]], list[Targets]]
    """Gives one `Targets` per row. Each row comes as an index into the corpus and as tokens.

    Raises NotCommitted and CorruptSegment from a cache; Unavailable, Overloaded, DeadlineExceeded and TeacherFailed
    from a service.
    """
    stored: bool = False
    """True where it reads a cache's objects, which are slow to open for the first time and cost no teacher anything."""
    normalised: bool = False
    """True where every answer is a distribution by how it is decoded, or was checked to be one when it arrived."""
    top_k: bool = True
    """False where it gives draws alone, by which a student is taught, but not measured."""
    committed: NDArray[np.bool_] | None = None
    """[S] bool, true for each shard that has targets; None where none lacks them."""


def read_all(sources: Sequence[TargetSource], rows: Sequence[int], tokens: Sequence[Tokens]) -> list[list[Targets]]:
    """Read rows from several sources side by side, in threads of this call; raises what the first of them raises."""
    if len(sources) < 2:
        return [source.read(rows, tokens) for source in sources]
    with ThreadPoolExecutor(len(sources), thread_name_prefix="source") as threads:
        return list(threads.map(lambda source: source.read(rows, tokens), sources))


def cache_source(
    name: str, targets: TargetSet | HttpTargets, k: int | None = None, loss: LossConfig = _PLAIN_LOSS
) -> TargetSource:
    """Read committed targets of a corpus by row index: `k` of the kept ids, by default all, and what a loss needs."""
    fields = needed_of_cache(name, k or targets.fields.k, targets.fields, loss)
    held = f"{_held(fields)}, encoding {targets.encoding.name}"
    stored = isinstance(targets, TargetSet)
    if isinstance(targets, TargetSet):
        targets.load_compiled()
    return TargetSource(
        name,
        targets.identity,
        held,
        partial(_read_kept, targets, fields, loss),
        stored=stored,
        # What is dense is kept as it came, whatever the top-k's encoding is.
        normalised=not stored or (targets.encoding.name in _NORMALISED and not loss.dense),
        top_k=fields.k > 0 or loss.dense,
    )


def _read_kept(
    targets: TargetSet | HttpTargets, fields: Fields, loss: LossConfig, rows: Sequence[int], _: Sequence[Tokens]
) -> list[Targets]:
    answers = targets.read_rows(rows, fields=fields)
    return [for_student(each, fields, loss, targets.unshared, NO_ID) for each in answers]


def service_source(
    name: str,
    teacher: SyncHttpTeacher,
    k: int | None = None,
    loss: LossConfig = _PLAIN_LOSS,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> TargetSource:
    """Ask a running service for every row by its tokens; which encoding it keeps answers in is up to the service.

    Where the loss needs draws, 50 are asked for by default, under `seed`.
    """
    fields = needed_of_service(k or Fields().k, draws or _DRAWS, seed, loss)

    def read(_: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        return [for_student(each, fields, loss, None, NO_ID) for each in teacher.score(rows, fields)]

    return TargetSource(name, teacher.identity, f"{_held(fields)}, from a service", read)


def _held(fields: Fields) -> str:
    more = ((each.text or each.name).format(**asdict(fields)) for each in fields.beside_top_k)
    return ", ".join([f"k={fields.k}", *more])


def asking_source(kept: TargetSource, live: TargetSource, corpus: Corpus) -> TargetSource:
    """Read what is kept, and ask the running teacher for rows of shards that were not when this was opened.

    Raises:
        SpecMismatch: the running teacher is another one.
    """
    if differences := kept.identity.differences(live.identity):
        raise SpecMismatch(f"the teacher {kept.name!r} at teachers.url is not the one in the cache: {differences}")
    committed = kept.committed
    assert committed is not None, "something is lacking"

    def read(rows: Sequence[int], tokens: Sequence[Tokens]) -> list[Targets]:
        shards = np.searchsorted(corpus.shard_rows, np.asarray(rows, dtype=np.int64), side="right") - 1
        found: dict[int, Targets] = {}
        for source, mask in ((kept, committed[shards]), (live, ~committed[shards])):
            at = np.flatnonzero(mask).tolist()
            if at:
                answers = source.read([rows[i] for i in at], [tokens[i] for i in at])
                found.update(zip(at, answers, strict=True))
        return [found[i] for i in range(len(rows))]

    normalised = kept.normalised and live.normalised
    return replace(kept, read=read, committed=None, stored=False, normalised=normalised)


@contextmanager
def open_cache(data: DataConfig) -> Iterator[Cache | HttpCache]:
    """Open the cache that the run names: a folder, an object store, or the URL of a service that has one.

    Raises:
        InvalidInput: no such folder, an unknown URL scheme, or a variable for the key that is not set.
    """
    if not data.cache.startswith(("http://", "https://")):
        yield Cache.open(data.cache)
        return
    with HttpCache(data.cache, api_key=key_in(data.api_key_env, "data.api_key_env")) as cache:
        yield cache


@contextmanager
def open_sources(
    teachers: Sequence[TeacherConfig],
    cache: Cache | HttpCache,
    corpus: Corpus,
    missing: Missing = "fail",
    loss: LossConfig = _PLAIN_LOSS,
) -> Iterator[tuple[TargetSource, ...]]:
    """Open the sources of teachers for a corpus, in their order; check them against it and what the loss needs.

    Raises:
        SpecMismatch: a teacher with another tokenizer than the corpus, or with another's name in the cache.
        NotCommitted: shards without targets, where `missing` is "fail", or "ask" without a URL.
        UnsupportedField: the loss needs what they lack, or `alm` and no teacher's targets are projected.
        UnknownTeacher, Unavailable: as the cache or the service says.
    """
    with ExitStack() as stack:
        opened = tuple(_open(teacher, cache, corpus, missing, loss, stack) for teacher in teachers)
        if loss.alm and not any(map(is_projected, opened)):
            raise UnsupportedField(
                f"train.alm is {loss.alm:g}, but no teacher's targets of corpus {corpus.name!r} are made of another "
                "tokenizer's by `potstill project`; leave it out"
            )
        yield opened


def is_projected(source: TargetSource) -> bool:
    """Tell whether targets are projected from those of another tokenizer."""
    return PROJECTED_FROM in source.identity.overrides


def common_prefix(sources: Sequence[TargetSource], chosen: tuple[int, ...] | None, vocab_size: int) -> tuple[int, ...]:
    """Find the token ids that the student sees in front of each row: the chosen ones, else those of its teachers.

    Raises:
        SpecMismatch: nothing is chosen, and the teachers have different ones.
        InvalidInput: an id that is chosen is over the corpus's vocabulary.
    """
    if chosen is not None:
        over = [token for token in chosen if token >= vocab_size]
        if over:
            raise InvalidInput(
                f"data.prefix_ids has id {over[0]}, but the corpus's tokenizer has {counted(vocab_size, 'id')}; take "
                f"ids up to {vocab_size - 1}"
            )
        return chosen
    prefixes = {source.name: source.identity.prefix_ids for source in sources}
    if len(set(prefixes.values())) > 1:
        theirs = ", ".join(f"{name!r} has {list(prefix)}" for name, prefix in prefixes.items())
        raise SpecMismatch(
            f"the teachers saw different prefixes: {theirs}; choose what the student sees by data.prefix_ids, like []"
        )
    return next(iter(prefixes.values()), ())


def _open(
    teacher: TeacherConfig,
    cache: Cache | HttpCache,
    corpus: Corpus,
    missing: Missing,
    loss: LossConfig,
    stack: ExitStack,
) -> TargetSource:
    compared = False
    if teacher.source == "service":
        source = _open_service(teacher, loss, stack)
    else:
        targets = cache.targets(teacher.name, corpus.name)
        kept = targets.fields.k
        top_k = targets.top_k_only() if kept or loss.needs_top_k else targets
        if (teacher.k or 0) > kept:
            raise UnsupportedField(
                f"teachers.k is {teacher.k} for {teacher.name!r}, but the cache holds k={kept}; lower teachers.k, or "
                f"prefill it under another name with --top-k {teacher.k}"
            )
        if loss.needs_more_than_top_k:
            targets = targets.only(needed_of_cache(teacher.name, teacher.k or kept, targets.fields, loss))
        else:
            targets = top_k
        source, held = cache_source(teacher.name, targets, teacher.k, loss), targets.fields
        committed = targets.committed
        if not committed.all():
            asked = teacher.model_copy(update={"k": teacher.k or kept or None, "draws": held.draws or None})
            source = replace(source, committed=committed)
            source = _with_missing(asked, source, corpus, missing, loss, held.seed, stack)
        compared = bool(targets.unshared)
    # The same id must be the same token to both, or the student would be taught noise.
    if isinstance(cache, Cache):
        require_one_identity(cache.root, source.name, source.identity)
    theirs = source.identity.tokenizer_sha256
    if theirs != corpus.tokenizer_sha256 and not compared:
        raise SpecMismatch(
            f"teacher {source.name!r} has tokenizer {theirs[:12]}, but the corpus was made with "
            f"{corpus.tokenizer_sha256[:12]}; use a corpus of the teacher's tokenizer, or, in the cache, targets that "
            "`potstill project` makes of such a corpus's"
        )
    return source


def _open_service(teacher: TeacherConfig, loss: LossConfig, stack: ExitStack, seed: int = 0) -> TargetSource:
    assert teacher.url is not None, "the config refuses a service without a url"
    key = key_in(teacher.api_key_env, "teachers.api_key_env")
    client = stack.enter_context(SyncHttpTeacher(teacher.url, teacher.name, api_key=key))
    return service_source(teacher.name, client, teacher.k, loss, draws=teacher.draws, seed=seed)


def _with_missing(
    teacher: TeacherConfig,
    source: TargetSource,
    corpus: Corpus,
    missing: Missing,
    loss: LossConfig,
    seed: int,
    stack: ExitStack,
) -> TargetSource:
    """Do what is asked for about shards without targets, of which there are some."""
    if missing == "skip":
        return source
    projected = is_projected(source)
    if missing == "ask" and teacher.url is not None and not projected:
        return asking_source(source, _open_service(teacher, loss, stack, seed), corpus)
    committed = source.committed
    assert committed is not None, "something is lacking"
    lacking, first = int((~committed).sum()), int(np.argmin(committed))
    way_out = "`potstill prefill` for it, or set data.missing to 'skip' or 'ask'"
    if projected:
        way_out = "`potstill project` for it, or set data.missing to 'skip'"
    elif missing == "ask":
        way_out = f"`potstill prefill` for it, or set teachers.url of {teacher.name!r}"
    raise NotCommitted(
        f"teacher {teacher.name!r} lacks {lacking:,} of {counted(committed.size, 'shard')}, the first is {first}, of "
        f"corpus {corpus.name!r}; run {way_out}"
    )
