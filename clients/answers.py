"""Bounds and checks of what a service describes and answers: it may be broken, or not ours."""

from __future__ import annotations

from typing import Any

from potstill.cache.corpus import Source
from potstill.cache.corpus.seal import CorpusSpec, check_spec
from potstill.cache.encoding.fields import check_fields
from potstill.cache.encoding.logprobs import check_targets
from potstill.cache.errors import FormatError, InvalidInput, TeacherFailed
from potstill.cache.targets.unshared_ids import UnsharedIds
from potstill.cache.types import Fields, Targets, TeacherIdentity

# Arrays of these lengths are made before anything that they are for has arrived.
_MOST_VOCABULARY = 2**24
_MOST_SHARDS = 2**24
_MOST_ROWS = 2**32


def described_identity(value: Any, name: str, url: str) -> TeacherIdentity:
    """Read a teacher's identity from the JSON of its description at a URL.

    Raises:
        TeacherFailed: it is no identity, or of an impossible vocabulary.
    """
    try:
        identity = TeacherIdentity.from_json(value)
        _check_most("vocab_size", identity.vocab_size, _MOST_VOCABULARY)
    except FormatError as error:
        raise TeacherFailed(f"{url} describes teacher {name!r} badly: {error.detail}") from error
    return identity


def described_unshared(value: Any, name: str, url: str) -> UnsharedIds:
    """Read the ids that mean other tokens to a teacher than to the corpus; none where the service is too old to tell.

    Raises:
        TeacherFailed: they are no ranges of ids.
    """
    try:
        return UnsharedIds.from_json(value)
    except FormatError as error:
        raise TeacherFailed(f"{url} describes teacher {name!r} badly: {error.detail}") from error


def described_corpus(description: dict[str, Any], url: str) -> CorpusSpec:
    """Read a corpus's seal, without its objects, from the JSON of its description at a URL.

    Raises:
        TeacherFailed: it is no seal, or of impossible counts.
    """
    try:
        # Services of before do not tell documents, nor serve a corpus that has a loss mask.
        values = {"num_documents": description.get("documents"), **description["spec"]}
        sources = tuple(Source(**source) for source in values.pop("sources"))
        spec = CorpusSpec(**values, sources=sources, data="", objects=())
        check_spec(spec, "its seal")
        for name, most in (
            ("vocab_size", _MOST_VOCABULARY),
            ("num_shards", _MOST_SHARDS),
            ("num_rows", _MOST_ROWS),
        ):
            _check_most(name, getattr(spec, name), most)
    except (KeyError, TypeError, ValueError, FormatError, InvalidInput) as error:
        raise TeacherFailed(f"{url} describes its corpus badly: {error!r}") from error
    return spec


def check_answer(targets: Targets, want: Fields, vocab_size: int, who: str) -> None:
    """Refuse answered targets as a cache refuses a teacher's; `who` begins the error.

    Raises:
        TeacherFailed: another K than was asked for, or numbers that no distribution has.
    """
    if targets.k != want.k:
        raise TeacherFailed(f"{who} answered k={targets.k}, not k={want.k}")
    try:
        check_targets(targets, vocab_size)
        check_fields(targets, want, vocab_size)
    except TeacherFailed as error:
        raise TeacherFailed(f"{who}: {error.detail}") from error


def _check_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise FormatError(f"{name} is {count}, over {most}, which none has")
