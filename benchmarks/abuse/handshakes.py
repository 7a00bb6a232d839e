"""Connections that never agree on TLS."""

from __future__ import annotations

import contextlib
import resource
import socket
import time

from benchmarks.abuse.attack import Attack, Door

CONNECTIONS = 1100
_ELSEWHERE = "127.0.0.2"  # another address than that of callers who behave
_SECONDS = 20.0


def silent_connections(door: Door) -> None:
    """Hold 1,100 connections and send nothing; needs no key."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this process; the service has its own
    with contextlib.ExitStack() as held:
        for _ in range(CONNECTIONS):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_connection((door.host, door.port), 5.0, (_ELSEWHERE, 0)))
        time.sleep(_SECONDS)


ATTACKS = (Attack(4, "1,100 silent connections", silent_connections, tls=True),)
