"""Limits of one request, checked before anything is scored, and the reading of its body and headers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from potstill.cache.errors import InvalidInput, LimitExceeded, MediaTypeError
from potstill.cache.types import Fields, Teacher, Tokens
from potstill.cache.wire import scores as wire
from potstill.teacher_service.settings import LimitSettings

TIMEOUT_HEADER = "potstill-timeout"
"""Header with the seconds after which the caller does not want the answer any more."""

_SPARE_VALUES = 1024  # keys, and what a client adds that is ignored
_JSON_BYTES = 32  # of a token id and what is around it, indented too
_FLAT_CAPTURE = "public-flat"
_FLAT_BYTES_PER_ENTRY = 90  # FlatLogprobs: four list slots, a float object and mostly an int object
_PROMPT_BYTES_PER_TOKEN = 80  # a list slot and an int object, in this process and in the engine's
_COPIES = 3  # see `engine_bytes_per_token`


def check_request(rows: Sequence[Tokens], want: Fields, *, teacher: Teacher, limits: LimitSettings) -> int:
    """Refuse rows that can never be scored; returns their number of tokens.

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
    # Known before any work, as every field has a largest size per position.
    num_bytes = num_tokens * want.bytes_per_position(vocab_size)
    if num_bytes > limits.max_answer_bytes:
        raise LimitExceeded(
            f"the answer would hold {num_bytes} bytes, over max_answer_bytes={limits.max_answer_bytes}; "
            "send fewer rows or ask for less"
        )
    return num_tokens


def engine_bytes_per_token(want: Fields, vocab_size: int, capture_path: str) -> int:
    """Bytes that one token inside the engine may need until its answer is handed on.

    `80 + 3 b + 90 (K + 1)`, the last term only on the capture path `public-flat`:

    - 80: the token itself, as a Python integer in this process and in the engine's.
    - b: the most that an answer holds per position (`Fields.bytes_per_position`). Three copies may live at once: the
      engine's arrays, our `Targets`, and the encoded or sent bytes.
    - 90 (K + 1): vLLM's flat lists hold a Python object per entry.

    Activations and logits of a step do not grow with the tokens that wait in the engine: `max_batch_tokens` and the
    chunks of the capture bound them.
    """
    flat = _FLAT_BYTES_PER_ENTRY * (want.k + 1) if capture_path == _FLAT_CAPTURE else 0
    return _PROMPT_BYTES_PER_TOKEN + _COPIES * want.bytes_per_position(vocab_size) + flat


async def read_body(request: Request) -> bytes:
    """Read the whole body. `BoundedTransfers` bounds its size and time, for every route.

    Raises:
        MediaTypeError: a compressed body. BodyTooLarge, RequestTimeout, Overloaded: found while reading.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise MediaTypeError(f"content-encoding {encoding[:40]!r} is not taken; send the body as it is")
    return b"".join([chunk async for chunk in request.stream()])


def json_value(body: bytes, *, max_lists: tuple[str, int], max_values: tuple[str, int]) -> Any:
    """Parse a JSON body of rows, which is counted before any object is made of it.

    Args:
        body: UTF-8.
        max_lists: name and value of the setting that bounds its lists and objects, beside a few.
        max_values: name and value of the setting that bounds its values.

    Raises:
        LimitExceeded: there are more. InvalidInput: it is not JSON.
    """
    # Brackets and commas within strings count too: no string of a body of rows has thousands of them. Two bytes of an
    # empty list are 64 in memory, and a number is 40; long text may take four bytes a character.
    counts = (
        ("lists and objects", body.count(b"[") + body.count(b"{"), *max_lists, _SPARE_VALUES + max_lists[1]),
        ("values", body.count(b","), *max_values, _SPARE_VALUES + max_lists[1] + max_values[1]),
        ("bytes", len(body), *max_values, _JSON_BYTES * (_SPARE_VALUES + max_values[1])),
    )
    for what, count, name, limit, most in counts:
        if count > most:
            raise LimitExceeded(
                f"{count} {what} of JSON are over the {most} that {name}={limit} lets through; send fewer per request"
            )
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # the latter by brackets within brackets, thousands deep
        raise InvalidInput(f"the body is not JSON: {error}") from error


def rows_of_tokens(body: bytes, limits: LimitSettings) -> Any:
    """Parse a JSON body whose rows are lists of token ids; raises as `json_value` does."""
    return json_value(
        body,
        max_lists=("max_rows", limits.max_rows),
        max_values=("max_tokens_in_flight", limits.max_tokens_in_flight),
    )


async def same_wire(request: Request) -> None:
    """Refuse a client that says it speaks another wire version; most requests have no body to say so in.

    Raises:
        WireVersionError: naming both.
    """
    wire.require_version(request.headers.get(wire.FORMAT_HEADER, wire.WIRE_VERSION)[:40])


def request_format(request: Request, taken: Sequence[str] = (wire.ARROW_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)) -> str:
    """The media type of the body.

    Raises:
        MediaTypeError: none of those that are taken.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in taken:
        raise MediaTypeError(f"content-type {kind[:80]!r} is not taken; send {' or '.join(taken)}")
    return kind


def answer_format(request: Request, default: str) -> str:
    """The first of our media types that the caller accepts, else `default`."""
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return next((kind for kind in accepted if kind in (wire.ARROW_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)), default)


def timeout_seconds(request: Request) -> float | None:
    """Seconds of the header `potstill-timeout`, or None without it.

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
