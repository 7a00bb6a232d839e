"""What is let in: how many requests and tokens may be in flight, and how big one request may be.

Tokens are the unit of a teacher's work and of its memory, so they are what is bounded. Nothing waits
here: a request over the bound is told to come back, and the client's jittered retries spread the load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.requests import Request

from cache import wire
from cache.errors import BodyTooLarge, InvalidInput, LimitExceeded, MediaTypeError, Overloaded
from cache.types import Fields, Teacher, Tokens
from teacher_service.settings import LimitSettings

TIMEOUT_HEADER = "potstill-timeout"
"""Seconds after which the caller does not want the answer any more."""


class Admission:
    """Counts what is in flight. Used from one event loop only."""

    def __init__(self, limits: LimitSettings) -> None:
        self.limits = limits
        self.tokens_in_flight = 0
        self.requests_in_flight = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold one request's place, from before its body is read until it is answered.

        Raises:
            Overloaded: `max_requests_in_flight` are there already.
        """
        if self.requests_in_flight >= self.limits.max_requests_in_flight:
            raise Overloaded(f"{self.requests_in_flight} score requests are in flight, the most allowed; retry later")
        self.requests_in_flight += 1
        try:
            yield
        finally:
            self.requests_in_flight -= 1

    @contextmanager
    def tokens(self, num_tokens: int) -> Iterator[None]:
        """Hold the place of `num_tokens` while they are scored.

        Raises:
            Overloaded: together with what is in flight they are over `max_tokens_in_flight`.
        """
        bound = self.limits.max_tokens_in_flight
        if self.tokens_in_flight + num_tokens > bound:
            raise Overloaded(
                f"{num_tokens} tokens are over what {bound} leaves beside {self.tokens_in_flight} in flight; "
                "retry later"
            )
        self.tokens_in_flight += num_tokens
        try:
            yield
        finally:
            self.tokens_in_flight -= num_tokens


def check_request(rows: Sequence[Tokens], want: Fields, *, teacher: Teacher, limits: LimitSettings) -> int:
    """Refuse what can never be scored; returns the number of tokens.

    Raises:
        InvalidInput: an empty row.
        LimitExceeded: too many rows or tokens, a row over the context, an id or K over the vocabulary, or
            an answer that would be too big.
    """
    if len(rows) > limits.max_rows:
        raise LimitExceeded(f"{len(rows)} rows are over max_rows={limits.max_rows}; send fewer per request")
    for index, row in enumerate(rows):
        if not len(row):
            raise InvalidInput(f"row {index} is empty; a row has at least one token")
    longest = max(map(len, rows), default=0)
    max_row_tokens, vocab_size = teacher.limits.max_row_tokens, teacher.identity.vocab_size
    if max_row_tokens is not None and longest > max_row_tokens:
        raise LimitExceeded(f"a row of {longest} tokens is over the teacher's {max_row_tokens}; cut it")
    num_tokens = sum(map(len, rows))
    if num_tokens > limits.max_tokens_in_flight:
        raise LimitExceeded(
            f"{num_tokens} tokens are over max_tokens_in_flight={limits.max_tokens_in_flight}; send fewer rows"
        )
    max_top_k = min(vocab_size, teacher.limits.max_top_k or vocab_size)
    if want.k > max_top_k:
        raise LimitExceeded(f"k={want.k} is over this teacher's {max_top_k}; ask for at most that")
    highest = max((int(row.max()) for row in rows if len(row)), default=0)
    if highest >= vocab_size:
        raise LimitExceeded(f"token id {highest} is over a vocabulary of {vocab_size}: another tokenizer?")
    num_bytes = num_tokens * bytes_per_position(want, vocab_size)
    if num_bytes > limits.max_answer_bytes:
        raise LimitExceeded(
            f"the answer would hold {num_bytes} bytes, over max_answer_bytes={limits.max_answer_bytes}; "
            "send fewer rows or ask for less"
        )
    return num_tokens


def bytes_per_position(want: Fields, vocab_size: int) -> int:
    """What an answer holds at most, as arrays: N draws are N ids and counts, a dense row V logprobs."""
    scalars = 2 + want.entropy + len(want.temperatures)
    draws = 8 + 6 * min(want.draws, vocab_size) if want.draws else 0
    return 8 * want.k + 4 * scalars + draws + (4 * vocab_size if want.dense else 0)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` plus one chunk.

    Raises:
        BodyTooLarge: over the limit, found while reading. MediaTypeError: a compressed body.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise MediaTypeError(f"content-encoding {encoding[:40]!r} is not taken; send the body as it is")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge(f"the body is over max_body_bytes={max_bytes}; send fewer rows per request")
        chunks.append(chunk)
    return b"".join(chunks)


def request_format(request: Request) -> str:
    """The media type of the body.

    Raises:
        MediaTypeError: neither Arrow nor JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (wire.ARROW_MEDIA_TYPE, wire.JSON_MEDIA_TYPE):
        raise MediaTypeError(
            f"content-type {kind[:80]!r} is not taken; send {wire.ARROW_MEDIA_TYPE} or {wire.JSON_MEDIA_TYPE}"
        )
    return kind


def answer_format(request: Request, default: str) -> str:
    """The first of our media types that the caller accepts, else `default`."""
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return next((kind for kind in accepted if kind in (wire.ARROW_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)), default)


def timeout_seconds(request: Request) -> float | None:
    """What the caller put into the header `potstill-timeout`, or None.

    Raises:
        InvalidInput: not a positive number.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"{TIMEOUT_HEADER} is {text[:40]!r}; it must be a positive number of seconds")
    return seconds
