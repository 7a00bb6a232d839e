"""Memory of a service whose bounds are all filled at once: answers to misses, answers from the cache, streams, bodies.

    python -m benchmarks.bench_bounds

Nobody takes an answer and no body is complete, so that everything that may be held is held. It exits 1 when the
service grows by over 2.25 GiB, which the limits promise; what its fake teacher computes with is in the figure too.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.abuse.attack import CORPUS, TEACHER, Attack, Door
from benchmarks.abuse.service import HERE, serving
from benchmarks.bench_abuse import PROMISED_BYTES
from potstill.cache import Fields
from potstill.cache.wire.scores import ARROW_MEDIA_TYPE, JSON_MEDIA_TYPE, ScoreRequest, request_to_arrow

ROW_TOKENS = 8000
K = 256
BODY_BYTES = 8 * 2**20
SETTLED_SECONDS = 3.0
_QUIET = Attack(0, "none", lambda _: None, settings=f"[keep]\nk = {K}")
_SCORE = f"/v1/teachers/{TEACHER}/score"


def main() -> int:
    """Fill the bounds one after the other, and print the memory; returns the exit status."""
    fillings: dict[str, Callable[[Door, int, ExitStack], str]] = {
        "answers to misses": lambda door, number, held: score(door, number, held, kept=False),
        "answers from the cache": lambda door, _, held: score(door, 0, held, kept=True),
        "streams": lambda door, _, held: ask(door, held, f"GET /v1/corpora/{CORPUS}/tokens", "", b"", 0),
        "bodies": lambda door, _, held: ask(door, held, f"POST {_SCORE}", JSON_MEDIA_TYPE, b"1" * (BODY_BYTES - 1), 1),
    }
    with tempfile.TemporaryDirectory() as name, serving(_QUIET, HERE, Path(name)) as service, ExitStack() as held:
        score(service.door, 0, held, kept=True)  # which keeps the row
        time.sleep(SETTLED_SECONDS)
        before = service.resident_bytes
        service.reset_peak()
        for what, fill in fillings.items():
            count = 0
            while count < 100 and fill(service.door, count, held) in ("200", ""):
                count += 1
            time.sleep(SETTLED_SECONDS)
            print(f"{what}: {count} held, +{(service.resident_bytes - before) / 2**20:,.0f} MiB", flush=True)
        peak = service.peak_bytes - before
    print(f"peak: +{peak / 2**20:,.0f} MiB of {PROMISED_BYTES / 2**20:,.0f} MiB")
    return 1 if peak > PROMISED_BYTES else 0


def score(door: Door, number: int, held: ExitStack, *, kept: bool) -> str:
    """Ask for 16 MiB of arrays; returns the status."""
    row = (np.arange(ROW_TOKENS, dtype=np.uint32) * (2 * number + 1)) % 256
    body = request_to_arrow(ScoreRequest([row], Fields(k=K)))
    return ask(door, held, f"POST {_SCORE}", ARROW_MEDIA_TYPE, body, 0, "" if kept else "Cache-Control: no-store\r\n")


def ask(door: Door, held: ExitStack, line: str, kind: str, body: bytes, missing: int, more: str = "") -> str:
    """Send a request of which so many bytes are missing; returns the status of its answer, "" where none came yet."""
    connection = held.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not taken stays in the service
    connection.settimeout(60)
    connection.connect((door.host, door.port))
    size = f"Content-Type: {kind}\r\nContent-Length: {len(body) + missing}\r\n" if body else ""
    connection.sendall(f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{door.trainer_lines}{more}{size}\r\n".encode() + body)
    if missing:
        connection.settimeout(1)
    try:
        return connection.recv(12).decode()[9:]
    except TimeoutError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
