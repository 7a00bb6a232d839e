"""Base class of a teacher in front of another one."""

from __future__ import annotations

from potstill.cache.types import Provenance, Teacher, TeacherIdentity, TeacherLimits


class WrappedTeacher:
    """A `Teacher` that has the identity, provenance and limits of an inner one; subclasses add `score`."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    @property
    def identity(self) -> TeacherIdentity:
        """Identity of the inner teacher."""
        return self.inner.identity

    @property
    def provenance(self) -> Provenance:
        """Provenance of the inner teacher right now: a pool may have started another engine since."""
        return self.inner.provenance

    @property
    def limits(self) -> TeacherLimits:
        """Limits of the inner teacher."""
        return self.inner.limits
