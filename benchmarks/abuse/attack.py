"""An attack: what it does to a service, and what the service has to look like for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEACHER = "fake"
CORPUS = "docs"
VOCAB = 512


@dataclass(frozen=True, slots=True)
class Door:
    """All that an attacker is given: where the service listens, and the keys of three roles ("" without keys)."""

    host: str
    port: int
    tls: bool
    trainer_key: str
    batch_key: str
    admin_key: str

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def trainer(self) -> dict[str, str]:
        """Headers of a trainer's request."""
        return {"Authorization": f"Bearer {self.trainer_key}"} if self.trainer_key else {}


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    `run` returns when it is over, within a minute. It lets errors of connections pass, as a service that
    defends itself cuts them, and raises AssertionError only where the service answers what it never may.
    """

    row: int
    """Number in the table of the results."""
    name: str
    run: Callable[[Door], None]
    prepare: Callable[[Path], None] | None = None
    """Adds to the cache at this root, before the service starts."""
    settings: str = ""
    """TOML for the service, appended to its settings: whole tables."""
    keys: bool = True
    tls: bool = False
