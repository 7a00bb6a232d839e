"""Sources of a student's targets: a cache, here or behind a service, or a running teacher. Rows in, targets out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from potstill.cache.cache import Cache
from potstill.cache.corpus import Corpus
from potstill.cache.errors import NotCommitted, SpecMismatch, UnsupportedField
from potstill.cache.plurals import counted
from potstill.cache.targets import TargetSet
from potstill.cache.targets.names import require_one_identity
from potstill.cache.types import Fields, Targets, TeacherIdentity, Tokens
from potstill.clients.address import key_in
from potstill.clients.http_targets import HttpCache, HttpTargets
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.student_trainer.data.settings import DataConfig, TeacherConfig

NO_ID = np.iinfo(np.int32).max
"""An id over any vocabulary, whose mass joins the tail: for ids that the student does not share, and where a row has
fewer ids than others; a real one would be taken out of the student's tail."""


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


def cache_source(name: str, targets: TargetSet | HttpTargets, k: int | None = None) -> TargetSource:
    """Read committed targets of a corpus by row index; `k` of the kept ids, by default all."""
    fields = Fields(k=k or targets.fields.k)
    held = f"k={fields.k}, encoding {targets.encoding.name}"
    return TargetSource(name, targets.identity, held, partial(_read_kept, targets, fields))


def _read_kept(
    targets: TargetSet | HttpTargets, fields: Fields, rows: Sequence[int], _: Sequence[Tokens]
) -> list[Targets]:
    """Read them with `NO_ID` in the place of ids that are another token to the student."""
    answers, other = targets.read_rows(rows, fields=fields), targets.unshared
    if not other:
        return answers
    return [replace(each, ids=np.where(other.holds(each.ids), np.uint32(NO_ID), each.ids)) for each in answers]


def service_source(name: str, teacher: SyncHttpTeacher, k: int | None = None) -> TargetSource:
    """Ask a running service for every row by its tokens; which encoding it keeps answers in is up to the service."""
    fields = Fields() if k is None else Fields(k=k)
    return TargetSource(
        name, teacher.identity, f"k={fields.k}, from a service", lambda _, rows: teacher.score(rows, fields)
    )


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
    teachers: Sequence[TeacherConfig], cache: Cache | HttpCache, corpus: Corpus
) -> Iterator[tuple[TargetSource, ...]]:
    """Open the sources of teachers for a corpus, in their order, and check them against it.

    Raises:
        SpecMismatch: a teacher with another tokenizer than the corpus, or with another's name in the cache.
        NotCommitted: a target set with shards that are not there yet.
        UnknownTeacher, UnsupportedField, Unavailable: as the cache or the service says.
    """
    with ExitStack() as stack:
        yield tuple(_open(teacher, cache, corpus, stack) for teacher in teachers)


def common_prefix(sources: Sequence[TargetSource], chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """Find the token ids that the student sees in front of each row: the chosen ones, else those of its teachers.

    Raises:
        SpecMismatch: nothing is chosen, and the teachers have different ones.
    """
    if chosen is not None:
        return chosen
    prefixes = {source.name: source.identity.prefix_ids for source in sources}
    if len(set(prefixes.values())) > 1:
        theirs = ", ".join(f"{name!r} has {list(prefix)}" for name, prefix in prefixes.items())
        raise SpecMismatch(
            f"the teachers saw different prefixes: {theirs}; choose what the student sees by data.prefix_ids, like []"
        )
    return next(iter(prefixes.values()), ())


def _open(teacher: TeacherConfig, cache: Cache | HttpCache, corpus: Corpus, stack: ExitStack) -> TargetSource:
    compared = False
    if teacher.source == "service":
        assert teacher.url is not None, "the config refuses a service without a url"
        key = key_in(teacher.api_key_env, "teachers.api_key_env")
        client = stack.enter_context(SyncHttpTeacher(teacher.url, teacher.name, api_key=key))
        source = service_source(teacher.name, client, teacher.k)
    else:
        targets = cache.targets(teacher.name, corpus.name).top_k_only()
        teacher_k, kept = teacher.k or 1, targets.fields.k
        if teacher_k > kept:
            raise UnsupportedField(
                f"teachers.k is {teacher_k} for {teacher.name!r}, but the cache holds k={kept}; lower teachers.k, or "
                f"prefill with --top-k {teacher_k}"
            )
        _check_committed(teacher.name, corpus.name, targets)
        source = cache_source(teacher.name, targets, teacher.k)
        compared = bool(targets.unshared)
    # The same id must be the same token to both, or the student would be taught noise.
    if isinstance(cache, Cache):
        require_one_identity(cache.root, source.name, source.identity)
    theirs = source.identity.tokenizer_sha256
    if theirs != corpus.tokenizer_sha256 and not compared:
        raise SpecMismatch(
            f"teacher {source.name!r} has tokenizer {theirs[:12]}, but the corpus was made with "
            f"{corpus.tokenizer_sha256[:12]}; use a corpus of the teacher's tokenizer"
        )
    return source


def _check_committed(name: str, corpus: str, targets: TargetSet | HttpTargets) -> None:
    committed = targets.committed
    missing = int((~committed).sum())
    if missing:
        first = int(np.argmin(committed))
        raise NotCommitted(
            f"teacher {name!r} lacks {missing:,} of {counted(committed.size, 'shard')}, the first is {first}, of "
            f"corpus {corpus!r}; run `potstill prefill` for it"
        )
