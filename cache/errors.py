"""The one error tree.

    PotstillError
      InvalidInput             422  bad value; fix the input
        LimitExceeded          422  a row, batch or K over a stated limit
          BodyTooLarge         413  a request body over the service's byte limit
        UnsupportedField       422  a field that this teacher or target set does not have
        WireVersionError       400  client and service speak different wire versions
        MediaTypeError         415  a request body of another content type
      NotFound                 404
        UnknownTeacher         404
        UnknownCorpus          404
        NotCommitted           404  positions whose shard has no commit yet
      SpecMismatch             409  another teacher, tokenizer, corpus or field set under the same name
      AlreadyExists            409  a sealed name is taken
      StoreError               507  the store could not keep or give the bytes (disk full, permission)
      FormatError              500  metadata that this version cannot read
      CorruptSegment           500  stored bytes that are not what was committed
      TeacherFailed            502  the engine failed or answered nonsense
      Unauthenticated          401  no API key, or one that the service does not know
      Forbidden                403  a key whose role may not do this
      RequestTimeout           408  a request body that came too slowly; retry later
      Overloaded               429  retry later
      Unavailable              503  retry later (starting, stopping, unreachable)
      DeadlineExceeded         504  the caller's deadline passed

Each class has a stable `kind` (append-only: clients switch on it), one HTTP status, and says whether
the same call may be tried again. A cache miss is not an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from potstill.cache.logins import without_login


class PotstillError(Exception):
    """Base of every error that is raised on purpose; `str(error)` is a line for a person, without logins of URLs."""

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, *args: object, retry_after: float | None = None) -> None:
        super().__init__(*(without_login(arg) if isinstance(arg, str) else arg for arg in args))
        self.retry_after = retry_after
        """Seconds after which the same call may succeed; None when that is not known."""

    @property
    def detail(self) -> str:
        """The message on one line, whatever the cause put into it."""
        return " ".join(str(self).split())


class InvalidInput(PotstillError):
    """A value that can never be accepted as it is."""

    kind = "invalid_input"
    status = 422


class LimitExceeded(InvalidInput):
    """A value over a stated limit."""

    kind = "limit_exceeded"


class BodyTooLarge(LimitExceeded):
    """A request body over the service's byte limit."""

    kind = "body_too_large"
    status = 413


class UnsupportedField(InvalidInput):
    """A field that this teacher or target set does not have."""

    kind = "unsupported_field"


class WireVersionError(InvalidInput):
    """The two ends of a connection speak different wire versions."""

    kind = "wire_version"
    status = 400


class MediaTypeError(InvalidInput):
    """A request body of a content type the route does not take."""

    kind = "media_type"
    status = 415


class NotFound(PotstillError):
    """Something named that is not there."""

    kind = "not_found"
    status = 404


class UnknownTeacher(NotFound):
    """No teacher, or no targets of a teacher, under that name."""

    kind = "unknown_teacher"


class UnknownCorpus(NotFound):
    """No sealed corpus under that name."""

    kind = "unknown_corpus"


class NotCommitted(NotFound):
    """Positions whose shard has no commit yet."""

    kind = "not_committed"


class SpecMismatch(PotstillError):
    """Another teacher, tokenizer, corpus, field set or encoding than the one recorded under the name."""

    kind = "spec_mismatch"
    status = 409


class AlreadyExists(PotstillError):
    """A sealed name is taken; nothing published is ever rewritten."""

    kind = "already_exists"
    status = 409


class StoreError(PotstillError):
    """The store could not keep or give the bytes (disk full, permission, unreachable)."""

    kind = "store"
    status = 507


class FormatError(PotstillError):
    """Metadata this version cannot read: written by a newer format, or not by this project."""

    kind = "format"
    status = 500


class CorruptSegment(PotstillError):
    """Stored bytes that are not what was committed; the message names the object."""

    kind = "corrupt_segment"
    status = 500


class TeacherFailed(PotstillError):
    """The engine failed, or answered what no model can mean (NaN)."""

    kind = "teacher_failed"
    status = 502


class Overloaded(PotstillError):
    """Too much work is waiting; try again later."""

    kind = "overloaded"
    status = 429
    retryable = True


class Unavailable(PotstillError):
    """Starting, stopping or unreachable; try again later."""

    kind = "unavailable"
    status = 503
    retryable = True


class Unauthenticated(PotstillError):
    """No API key, or one that the service does not know."""

    kind = "unauthenticated"
    status = 401


class Forbidden(PotstillError):
    """A known key whose role may not do this."""

    kind = "forbidden"
    status = 403


class RequestTimeout(PotstillError):
    """A request body that did not arrive in time."""

    kind = "request_timeout"
    status = 408
    retryable = True


class DeadlineExceeded(PotstillError):
    """The caller's deadline passed before there was an answer."""

    kind = "deadline_exceeded"
    status = 504


def _tree(root: type[PotstillError]) -> Iterator[type[PotstillError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def error_kinds() -> list[str]:
    """Every `kind` that there is."""
    return [cls.kind for cls in _tree(PotstillError)]


def error_class(kind: str) -> type[PotstillError]:
    """The class with this `kind`; `PotstillError` itself for a kind this version does not know."""
    return next((cls for cls in _tree(PotstillError) if cls.kind == kind), PotstillError)
