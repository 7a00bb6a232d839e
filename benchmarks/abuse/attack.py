"""An attack: what it does to a service, and what the service has to look like for it."""

from __future__ import annotations

import socket
import ssl
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

    @property
    def trainer_lines(self) -> str:
        """Those headers as the lines of a request that is written by hand."""
        return "".join(f"{name}: {value}\r\n" for name, value in self.trainer.items())

    def connect(self, timeout: float = 60.0) -> socket.socket:
        """Open a connection that bytes can be sent over as they are, in TLS where the service speaks it."""
        plain = socket.create_connection((self.host, self.port), timeout=timeout)
        return trusting().wrap_socket(plain) if self.tls else plain


def trusting() -> ssl.SSLContext:
    """TLS with a server of any certificate: it is ours, and made a moment ago."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


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
