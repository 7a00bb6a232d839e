"""Clients that ask for much and do not take it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from benchmarks.abuse.attack import TEACHER, Attack, Door
from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows

LARGE = "large-tokenizer"
TOKENIZER_BYTES = 8 * 2**20
UNREAD = 200
STARE_SECONDS = 10.0
ECHOES = 6
ECHO_TOKENS = 8000


def large_tokenizer(root: Path) -> None:
    """Add a corpus of one row whose tokenizer has 8 MiB."""
    words = {f"{'w' * 40}{index:08}": index for index in range(TOKENIZER_BYTES // 60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    row = np.arange(9, dtype=np.uint32)
    ingest_rows(Cache.open(root, mode="r+").root, LARGE, [row], tokenizer, IngestPlan(row_tokens=16))


def unread_tokenizers(door: Door) -> None:
    """Ask 200 times for a tokenizer of 8 MiB, and read none of the answers."""
    head = f"GET /v1/corpora/{LARGE}/tokenizer HTTP/1.1\r\nHost: 127.0.0.1\r\n{door.trainer_lines}\r\n"
    with staring(door, [head.encode()] * UNREAD):
        time.sleep(STARE_SECONDS)


def unread_echoes(door: Door) -> None:
    """Ask for all logprobs of six prompts of 8,000 tokens, and read none of the answers."""
    prompt = [index % 256 for index in range(ECHO_TOKENS)]
    asked = {"model": TEACHER, "prompt": prompt, "echo": True, "logprobs": 256, "max_tokens": 1}
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{door.trainer_lines}Content-Type: application/json\r\n"
        f"Cache-Control: no-store\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    # One is computed at a time and none is kept: the answers are measured, and the fake teacher takes 125 MiB for one.
    with staring(door, [head.encode() + body] * ECHOES, begun=True):
        time.sleep(STARE_SECONDS)


@contextlib.contextmanager
def staring(door: Door, requests: list[bytes], *, begun: bool = False) -> Iterator[None]:
    """Send each request on a connection of its own, whose answer is not read while the block runs.

    With `begun` each answer begins before the next request is sent.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for request in requests:
            connection = stack.enter_context(door.connect())
            connection.sendall(request)
            if begun:
                connection.recv(1)
        yield


ATTACKS = (
    Attack(6, "200 unread tokenizers", unread_tokenizers, prepare=large_tokenizer),
    Attack(7, "6 echoes of 8,000 tokens with 256 logprobs", unread_echoes),
)
