"""A teacher in front of another teacher."""

from __future__ import annotations

from potstill.cache.types import Provenance, Teacher, TeacherIdentity, TeacherLimits


class WrappedTeacher:
    """The base of a `Teacher` that does something around the `score` of an inner one, and hands on what that is."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    @property
    def identity(self) -> TeacherIdentity:
        """The inner teacher's."""
        return self.inner.identity

    @property
    def provenance(self) -> Provenance:
        """The inner teacher's right now: a pool may have started another engine since."""
        return self.inner.provenance

    @property
    def limits(self) -> TeacherLimits:
        """The inner teacher's."""
        return self.inner.limits
