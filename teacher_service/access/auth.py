"""Callers and their roles.

The caller of a request is in a context variable, which tasks started while it is served inherit.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum

from potstill.cache.errors import Forbidden
from potstill.teacher_service.access.quotas import Quota


class Role(Enum):
    """Rights of a key. Each role may also do all that the ones before it may."""

    TRAINER = "trainer"
    """Score rows and read what is there."""
    BATCH = "batch"
    """Fill corpora, too."""
    ADMIN = "admin"
    """Everything: add, remove and scale teachers."""

    def includes(self, other: Role) -> bool:
        """True where this role may do all that `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request, named like its key; the name is empty where the service has no keys."""

    name: str
    role: Role
    quota: Quota = field(default_factory=Quota)


EVERYBODY = Caller("", Role.ADMIN)
"""The caller where the service has no keys. It may do everything: such a service listens on loopback only."""

caller: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)
"""Set for every request before any route sees it."""


def current_caller() -> Caller:
    """The caller of the request that is being served."""
    return caller.get()


@dataclass(frozen=True, slots=True)
class allow:  # noqa: N801 -- reads as a verb where routes use it: Depends(allow(Role.ADMIN))
    """A route's declaration of the role it needs: `dependencies=[Depends(allow(Role.BATCH))]`."""

    role: Role

    async def __call__(self) -> None:
        """Let the caller pass, or raise Forbidden where its role is too low."""
        who = current_caller()
        if not who.role.includes(self.role):
            raise Forbidden(
                f"this needs the role {self.role.value}; the key {who.name!r} has the role {who.role.value}"
            )
