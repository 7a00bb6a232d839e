"""All attacks at once, again and again, in a process of their own so that they do not slow the callers beside them."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.abuse.attack import Attack, Door


def together(attacks: Sequence[Attack]) -> Attack:
    """One attack with what all of these need of the service, and with TLS."""

    def prepare(root: Path) -> None:
        for attack in attacks:
            if attack.prepare is not None:
                attack.prepare(root)

    settings = "\n".join(sorted({attack.settings for attack in attacks}))
    return Attack(0, "all at once", lambda _: None, prepare=prepare, settings=settings, tls=True)


@contextmanager
def besieging(attacks: Sequence[Attack], door: Door) -> Iterator[None]:
    """Attack while the block runs."""
    process = multiprocessing.get_context("fork").Process(target=_attack, args=(attacks, door), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _attack(attacks: Sequence[Attack], door: Door) -> None:
    threads = [threading.Thread(target=_again_and_again, args=(attack, door)) for attack in attacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _again_and_again(attack: Attack, door: Door) -> None:
    while True:
        # A service that defends itself refuses also what an attack needs for itself; it goes on all the same.
        with suppress(httpx.HTTPError, OSError, RuntimeError):
            attack.run(door)
