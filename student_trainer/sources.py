"""Where a student's targets come from: a cache, here or behind a service, or a teacher. Rows in, targets out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.cache.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.encoding.logprobs import Encoding
from potstill.cache.errors import NotCommitted, SpecMismatch, UnsupportedField
from potstill.cache.plurals import counted
from potstill.cache.types import Fields, Targets, TeacherIdentity, Tokens
from potstill.clients.address import key_in
from potstill.clients.http_targets import HttpCache
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.student_trainer.config import DataConfig, TeacherConfig, TrainConfig


class HeldTargets(Protocol):
    """Committed targets, here (`TargetSet`) or behind a service (`HttpTargets`)."""

    @property
    def identity(self) -> TeacherIdentity:
        """Whose they are."""
        ...

    @property
    def fields(self) -> Fields:
        """What is kept of each position."""
        ...

    @property
    def encoding(self) -> Encoding:
        """How logprobs are kept."""
        ...

    @property
    def committed(self) -> NDArray[np.bool_]:
        """[S] which shards have a commit."""
        ...

    def read_rows(self, rows: Sequence[int], *, fields: Fields | None = None) -> list[Targets]:
        """One `Targets` per row index, in order."""
        ...


class TargetSource(Protocol):
    """One teacher's targets of any rows of one corpus."""

    @property
    def name(self) -> str:
        """The teacher's."""
        ...

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's."""
        ...

    @property
    def held(self) -> str:
        """What is read of its targets: another one makes another run."""
        ...

    def read(self, indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:
        """One `Targets` per row, given both as indexes into the corpus and as tokens.

        Raises:
            NotCommitted, CorruptSegment: from a cache.
            Unavailable, Overloaded, DeadlineExceeded, TeacherFailed: from a service.
        """
        ...


@dataclass(frozen=True, slots=True)
class CacheSource:
    """Committed targets of the corpus, by row index."""

    name: str
    targets: HeldTargets
    k: int | None = None

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's, as recorded in the cache."""
        return self.targets.identity

    @property
    def held(self) -> str:
        """K and encoding."""
        return f"k={self.k or self.targets.fields.k}, encoding {self.targets.encoding.name}"

    def read(self, indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:  # noqa: ARG002
        """Read from the store; the tokens are not needed."""
        return self.targets.read_rows(list(indexes), fields=Fields(k=self.k or self.targets.fields.k))


@dataclass(frozen=True, slots=True)
class ServiceSource:
    """A running service, asked for every row; what it keeps is up to the service."""

    name: str
    teacher: SyncHttpTeacher
    k: int | None = None

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's, as the service states it."""
        return self.teacher.identity

    @property
    def held(self) -> str:
        """K; the encoding is up to the service."""
        return f"k={self.k or Fields().k}, from a service"

    def read(self, indexes: Sequence[int], rows: Sequence[Tokens]) -> list[Targets]:  # noqa: ARG002
        """Ask the service; the indexes mean nothing to it."""
        return self.teacher.score(rows, Fields() if self.k is None else Fields(k=self.k))


@contextmanager
def open_cache(data: DataConfig) -> Iterator[Cache | HttpCache]:
    """The cache that the run names: a folder, an object store, or the URL of a service that has one.

    Raises:
        InvalidInput: no such folder, an unknown URL scheme, or a variable for the key that is not set.
    """
    if not data.cache.startswith(("http://", "https://")):
        yield Cache.open(data.cache)
        return
    with HttpCache(data.cache, api_key=key_in(data.api_key_env, "data.api_key_env")) as cache:
        yield cache


@contextmanager
def open_sources(config: TrainConfig, cache: Cache | HttpCache, corpus: Corpus) -> Iterator[tuple[TargetSource, ...]]:
    """The sources of all of the run's teachers, in the config's order, checked against the corpus.

    Raises:
        SpecMismatch: a teacher with another tokenizer than the corpus.
        NotCommitted: a target set with shards that are not there yet.
        UnknownTeacher, UnsupportedField, Unavailable: as the cache or the service says.
    """
    with ExitStack() as stack:
        yield tuple(_open(teacher, config.data.corpus, cache, corpus, stack) for teacher in config.teachers)


def check_tokenizer(source: TargetSource, corpus: Corpus) -> None:
    """Check that the teacher's ids mean what the corpus's ids mean.

    Raises:
        SpecMismatch: they do not.
    """
    theirs = source.identity.tokenizer_sha256
    if theirs != corpus.tokenizer_sha256:
        raise SpecMismatch(
            f"teacher {source.name!r} has tokenizer {theirs[:12]}, but the corpus was made with "
            f"{corpus.tokenizer_sha256[:12]}; use a corpus of the teacher's tokenizer"
        )


def _open(
    teacher: TeacherConfig, corpus_name: str, cache: Cache | HttpCache, corpus: Corpus, stack: ExitStack
) -> TargetSource:
    source: TargetSource
    if teacher.source == "service":
        assert teacher.url is not None, "the config refuses a service without a url"
        key = key_in(teacher.api_key_env, "teachers.api_key_env")
        client = stack.enter_context(SyncHttpTeacher(teacher.url, teacher.name, api_key=key))
        source = ServiceSource(teacher.name, client, teacher.k)
    else:
        targets = cache.targets(teacher.name, corpus_name).top_k_only()
        teacher_k, kept = teacher.k or 1, targets.fields.k
        if teacher_k > kept:
            raise UnsupportedField(f"teachers.k is {teacher_k} for {teacher.name!r}, but the cache holds k={kept}")
        _check_committed(teacher.name, targets)
        source = CacheSource(teacher.name, targets, teacher.k)
    check_tokenizer(source, corpus)
    return source


def _check_committed(name: str, targets: HeldTargets) -> None:
    committed = np.asarray(targets.committed)
    missing = int((~committed).sum())
    if missing:
        first = int(np.argmin(committed))
        raise NotCommitted(
            f"teacher {name!r} lacks {missing:,} of {counted(committed.size, 'shard')}, the first is {first}; "
            f"run `potstill prefill` for it"
        )
