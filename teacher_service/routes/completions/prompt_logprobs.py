"""Logprobs as the JSON text that vLLM's server answers, written as bytes without a Python object per entry.

    [null, {"ID": {"logprob": X, "rank": R, "decoded_token": null}, ...}, ...]      prompt_logprobs
    ,{"token_id:ID": X, ...}, ...                                                   top_logprobs of logprobs

Position i of `prompt_logprobs` scores prompt token i, so it comes from target i - 1, and position 0 is null. The token
of a position itself comes first, whatever its rank; the others follow by falling logprob.

Every entry is written into a record of fixed width, padded with blanks that JSON allows and that are taken out at the
end. Ids and digits come from tables, so the work is a few numpy passes over bytes.

Shape legend:  T tokens, P positions, K kept entries, V vocabulary size, W bytes of an entry's record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from potstill.cache.types import Targets, Tokens

LEAST_LOGPROB = -9999.0
"""Least logprob that vLLM writes, as JSON has no -inf (`clamp_prompt_logprobs` of vLLM 0.32)."""

_CHUNK_BYTES = 1 << 18
"""Bytes of records worked on at one time; they fit a core's cache."""
NAME_PREFIX = "token_id:"
"""Text before an id where a token is named, as there is no tokenizer here."""
_DECIMALS = 8  # half a unit is 5e-9 nats, which float32 cannot tell apart from -0.06 on
_GROUP = 10_000  # four digits at once come from a table of this size


@dataclass(frozen=True, slots=True, eq=False)
class _Template:
    """The text of one position, K entries and the label, with blanks where its values go."""

    record: np.dtype[np.void]
    position: NDArray[np.uint8]
    ranks: NDArray[np.void] | None
    """[max(K, 1) + 2] each rank as text; None where ranks are not told."""


def prompt_logprobs_text(row: Tokens, targets: Targets, k: int) -> Iterator[bytes]:
    """Write the value of `prompt_logprobs`, in parts of about 256 KiB.

    Args:
        row: [T] token ids of the prompt.
        targets: its T targets, of K >= max(k, 1).
        k: entries beside the prompt's own token; 0 for none.

    A token outside the top max(k, 1) gets the rank after it, the least that it can have: its true rank is not known.
    """
    yield b"[null"
    yield from _texts_of_positions(row[1:], targets, k, most=k, prefix="", ranked=True)
    yield b"]"


def top_logprobs_text(labels: Tokens, targets: Targets, k: int, most: int) -> Iterator[bytes]:
    """Write the items of `top_logprobs`, a comma before each, in parts of about 256 KiB.

    Args:
        labels: [P] each position's own token.
        targets: their targets, of K >= max(k, 1).
        k: entries among which a label is looked for, at most `most` + 1.
        most: entries beside the label.
    """
    return _texts_of_positions(labels, targets, k, most=most, prefix=NAME_PREFIX, ranked=False)


def label_logprobs(labels: Tokens, targets: Targets, k: int) -> Iterator[NDArray[np.float64]]:
    """The logprob of each position's own token as it is written, in parts; arguments as of `top_logprobs_text`."""
    for start, stop in _steps(len(labels), 8 * max(k, 1)):
        _, own = ranked_labels(labels[start:stop], targets[start:stop].prefix(max(k, 1)))
        yield own.astype(np.float64).clip(LEAST_LOGPROB, 0.0).round(_DECIMALS)


def _texts_of_positions(
    labels: Tokens, targets: Targets, k: int, *, most: int, prefix: str, ranked: bool
) -> Iterator[bytes]:
    vocab_size = int(max(labels.max(initial=0), targets.ids.max(initial=0))) + 1
    # Powers of two, so that few tables are made, and none of them depends on what is in a prompt.
    keys = _key_table(1 << max(vocab_size - 1, 1).bit_length(), prefix)
    template = _template(k, keys.dtype.itemsize, ranked=ranked)
    for start, stop in _steps(len(labels), len(template.position)):
        part = targets[start:stop].prefix(max(k, 1))
        yield _positions_text(labels[start:stop], part, k, most, keys, template)


def _steps(count: int, item_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of `count` items, each of about `_CHUNK_BYTES`."""
    step = max(1, _CHUNK_BYTES // item_bytes)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def ranked_labels(labels: Tokens, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[P] rank and logprob of each label; the rank is K + 1 for one that is not among the top K."""
    found = targets.ids == labels[:, None]
    inside = found.any(axis=1)
    place = found.argmax(axis=1)
    shown = np.take_along_axis(targets.logprobs, place[:, None], axis=1)[:, 0]
    return np.where(inside, place + 1, targets.k + 1), np.where(inside, shown, targets.label_logprob)


def _positions_text(
    labels: Tokens, targets: Targets, k: int, most: int, keys: NDArray[np.void], template: _Template
) -> bytes:
    """The text `,{...}` of each position, of at most `most` entries beside the label."""
    text = np.empty((len(labels), len(template.position)), np.uint8)
    text[:] = template.position
    width = template.record.itemsize
    entries: NDArray[np.void] = np.ndarray(
        (len(labels), k + 1), template.record, buffer=text.data, offset=1, strides=(text.shape[1], width)
    )
    ranks, label_logprobs = ranked_labels(labels, targets)
    if template.ranks is not None:
        entries["rank"][:, 0] = template.ranks[ranks]
    ids = np.concatenate([labels[:, None], targets.ids[:, :k]], axis=1)
    entries["key"] = keys[ids]
    logprobs = np.concatenate([label_logprobs[:, None], targets.logprobs[:, :k]], axis=1)
    _fill_numbers(entries, logprobs)
    # A label of the top k stands in front already.
    twice = np.flatnonzero(ranks <= k)
    records = text[:, 1:-1].reshape(len(labels), k + 1, width)
    records[twice, ranks[twice]] = ord(" ")
    if k > most:
        records[np.flatnonzero(ranks > k), k] = ord(" ")
    return text.tobytes().translate(None, b" ")


def _fill_numbers(entries: NDArray[np.void], logprobs: NDArray[np.float32]) -> None:
    # Fixed point in int64: float32 has too few digits for eight decimals.
    whole_table, group_table = _number_tables()
    fixed = np.rint(np.clip(-logprobs.astype(np.float64), 0.0, -LEAST_LOGPROB) * 10**_DECIMALS).astype(np.int64)
    high = fixed // _GROUP
    entries["low"] = group_table[fixed - high * _GROUP]
    whole = high // _GROUP
    entries["high"] = group_table[high - whole * _GROUP]
    entries["whole"] = whole_table[whole]


@lru_cache(maxsize=8)
def _key_table(size: int, prefix: str) -> NDArray[np.void]:
    """[size] texts `"ID":`, the prefix before the id, padded with blanks."""
    return _texts([f'"{prefix}{number}":' for number in range(size)], width=len(f"{prefix}{size - 1}") + 3)


@lru_cache(maxsize=1)
def _number_tables() -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Texts of 0 to 9999, as `-N` for whole nats and as four digits."""
    return (
        _texts([f"-{number}" for number in range(_GROUP)], width=5),
        _texts([f"{number:04}" for number in range(_GROUP)], width=4),
    )


@lru_cache(maxsize=64)
def _template(k: int, key_width: int, *, ranked: bool) -> _Template:
    rank_width = len(str(max(k, 1) + 1))
    parts = [("comma", ","), ("key", " " * key_width), ("before", '{"logprob":' * ranked)]
    parts += [("whole", " " * 5), ("dot", "."), ("high", " " * 4), ("low", " " * 4)]
    if ranked:
        parts += [("middle", ',"rank":'), ("rank", " " * rank_width), ("after", ',"decoded_token":null}')]
    record = np.dtype([(name, f"V{len(text)}") for name, text in parts])
    entries = np.frombuffer("".join(text for _, text in parts).encode() * (k + 1), record).copy()
    ranks = _texts([str(rank) for rank in range(max(k, 1) + 2)], width=rank_width) if ranked else None
    if ranks is not None:
        entries["rank"][1:] = ranks[1 : k + 1]
    entries["comma"][0] = b"{"
    return _Template(record, np.frombuffer(b"," + entries.tobytes() + b"}", np.uint8), ranks)


def _texts(texts: list[str], *, width: int) -> NDArray[np.void]:
    padded = "".join(text.ljust(width) for text in texts).encode()
    return np.frombuffer(padded, np.dtype(f"V{width}"))
