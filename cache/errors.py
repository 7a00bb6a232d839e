"""The tree of all errors that are raised on purpose.

Each class has a stable `kind` that clients switch on (kinds are only ever added), one HTTP status, and says if the
same call may be tried again. A cache miss is not an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from potstill.cache.logins import pieces_without_login, without_login
from potstill.cache.printable import printable

_BEGIN_CHARACTERS = 700
_END_CHARACTERS = 300
_LOOKED_AT = 2**14
_BETWEEN_WORDS = re.compile(r"""[\s'"]""")


class PotstillError(Exception):
    """Base class of all errors that are raised on purpose.

    `str(error)` is for people: it has no login of any URL, and of a text over 1,000 characters only begin and end.
    """

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls, *, kind: str = "", status: int = 0, retryable: bool = False) -> None:
        """Set what the class line says; the rest is as in the class above."""
        cls.kind = kind or cls.kind
        cls.status = status or cls.status
        cls.retryable = retryable or cls.retryable

    def __init__(self, *args: object, retry_after: float | None = None) -> None:
        super().__init__(*(_shown(arg) if isinstance(arg, str) else arg for arg in args))
        self.retry_after = retry_after
        """Seconds after which the same call may succeed; None when that is not known."""

    @property
    def detail(self) -> str:
        """The message on one line that a terminal may show, whatever the cause put into it."""
        return printable(" ".join(str(self).split()))


class InvalidInput(PotstillError, kind="invalid_input", status=422):
    """A value that can never be accepted as it is."""


class LimitExceeded(InvalidInput, kind="limit_exceeded"):
    """A value over a stated limit."""


class BodyTooLarge(LimitExceeded, kind="body_too_large", status=413):
    """A request body over the service's byte limit."""


class UnsupportedField(InvalidInput, kind="unsupported_field"):
    """A field that this teacher or target set does not have."""


class WireVersionError(InvalidInput, kind="wire_version", status=400):
    """The two ends of a connection speak different wire versions."""


class MediaTypeError(InvalidInput, kind="media_type", status=415):
    """A request body of a content type the route does not take."""


class NotFound(PotstillError, kind="not_found", status=404):
    """Something named that is not there."""


class UnknownTeacher(NotFound, kind="unknown_teacher"):
    """No teacher, or no targets of a teacher, under that name."""


class UnknownCorpus(NotFound, kind="unknown_corpus"):
    """No sealed corpus under that name."""


class NotCommitted(NotFound, kind="not_committed"):
    """Positions whose shard has no commit yet."""


class SpecMismatch(PotstillError, kind="spec_mismatch", status=409):
    """Another teacher, tokenizer, corpus, field set or encoding than the one recorded under the name."""


class AlreadyExists(PotstillError, kind="already_exists", status=409):
    """A sealed name is taken; nothing published is ever rewritten."""


class StoreError(PotstillError, kind="store", status=507):
    """The store could not keep or give the bytes (disk full, permission, unreachable)."""


class StoreSilent(StoreError, kind="store_silent", retryable=True):
    """An object store that does not answer, and may do so later."""


class FormatError(PotstillError, kind="format", status=500):
    """Metadata this version cannot read: written by a newer format, or not by this project."""


class CorruptSegment(PotstillError, kind="corrupt_segment", status=500):
    """Stored bytes that are not what was committed; the message names the object."""


class TeacherFailed(PotstillError, kind="teacher_failed", status=502):
    """The engine failed, or answered what no model can mean (NaN)."""


class Overloaded(PotstillError, kind="overloaded", status=429, retryable=True):
    """Too much work is waiting; try again later."""


class Unavailable(PotstillError, kind="unavailable", status=503, retryable=True):
    """Starting, stopping or unreachable; try again later."""


class Unauthenticated(PotstillError, kind="unauthenticated", status=401):
    """No API key, or one that the service does not know."""


class Forbidden(PotstillError, kind="forbidden", status=403):
    """A known key whose role may not do this."""


class RequestTimeout(PotstillError, kind="request_timeout", status=408, retryable=True):
    """A request body that did not arrive in time."""


class DeadlineExceeded(PotstillError, kind="deadline_exceeded", status=504):
    """The caller's deadline passed before there was an answer."""


def _shown(text: str) -> str:
    # A caller's value that is quoted may be megabytes, with a million places where a login may begin; no more is
    # searched than may be shown. What is wrong stands before it, and the way out behind.
    begin = ""
    for piece in pieces_without_login(text):
        begin += piece
        if len(begin) > _BEGIN_CHARACTERS + _END_CHARACTERS:
            break
    else:
        return begin
    left_out = len(text) - _BEGIN_CHARACTERS - _END_CHARACTERS
    return f"{begin[:_BEGIN_CHARACTERS]}...({left_out} characters left out)...{_end(text)[-_END_CHARACTERS:]}"


def _end(text: str) -> str:
    """The last words of a text, without logins; no word is cut, as half a login looks like none."""
    start = len(text) - _LOOKED_AT
    if start > 0:
        found = _BETWEEN_WORDS.search(text, start)
        start = len(text) if found is None else found.start()
    return without_login(text[max(start, 0) :])


def _tree(root: type[PotstillError]) -> Iterator[type[PotstillError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def error_kinds() -> list[str]:
    """Kinds of all errors."""
    return [cls.kind for cls in _tree(PotstillError)]


def error_class(kind: str) -> type[PotstillError]:
    """Class with this `kind`; `PotstillError` itself for a kind that this version does not know."""
    return next((cls for cls in _tree(PotstillError) if cls.kind == kind), PotstillError)
