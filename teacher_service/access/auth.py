"""Who calls, and what they may do: API keys with roles.

The caller of a request is known in its context, and in every task that is started from there.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum

from potstill.cache.errors import Forbidden
from potstill.teacher_service.access.quotas import Quota


class Role(Enum):
    """What a key may do. Each role may do all that the ones before it may."""

    TRAINER = "trainer"
    """Score rows and read what is there."""
    BATCH = "batch"
    """Fill corpora, too."""
    ADMIN = "admin"
    """Everything: add, remove and scale teachers."""

    def includes(self, other: Role) -> bool:
        """Whether this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; the empty name is everybody, where there are no keys."""

    name: str
    role: Role
    quota: Quota = field(default_factory=Quota)


EVERYBODY = Caller("", Role.ADMIN)
"""The caller where the service has no keys: it listens on loopback only then."""

caller: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)
"""Set for every request before any route sees it."""


def current_caller() -> Caller:
    """Who sent the request that is being served."""
    return caller.get()


@dataclass(frozen=True, slots=True)
class allow:  # noqa: N801 -- reads as a verb where routes use it: Depends(allow(Role.ADMIN))
    """What a route declares: `dependencies=[Depends(allow(Role.BATCH))]`."""

    role: Role

    async def __call__(self) -> None:
        """Let the caller pass.

        Raises:
            Forbidden: the caller's role may not.
        """
        who = current_caller()
        if not who.role.includes(self.role):
            raise Forbidden(
                f"this needs the role {self.role.value}; the key {who.name!r} has the role {who.role.value}"
            )
