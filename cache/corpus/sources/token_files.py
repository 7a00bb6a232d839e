"""Documents of files of token ids: `.bin` as of nanoGPT, with a header as of modded-nanogpt, or with Megatron's `.idx`.

Shape legend:  Q sequences, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from potstill.cache.corpus.sources.documents import Ids
from potstill.cache.corpus.sources.files import SourceFile
from potstill.cache.errors import InvalidInput

_BLOCK_TOKENS = 1 << 20
# The headers of llm.c and of what grew from it: magic number and version to the type of the tokens behind.
_HEADER_BYTES = 256 * 4
_HEADERS: dict[tuple[int, ...], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def token_documents(file: SourceFile, vocab_size: int, eos: int | None) -> Iterator[Ids]:
    """Read the documents of a file of token ids.

    Args:
        file: it is read as Megatron's where an `.idx` lies beside it.
        vocab_size: one more than the tokenizer's largest id; raw ids are uint16 where that is enough, else uint32.
        eos: id at which documents end. Where the file begins with it, they begin with it. Without, all is one.

    Raises:
        InvalidInput: sizes do not fit, or the index is none.
    """
    index = file.path.with_suffix(".idx")
    if index.is_file():
        yield from _indexed(file.path, index)
        return
    tokens = _raw(file.path, vocab_size)
    start = 0
    for number, stop in enumerate(_stops(tokens, eos)):
        yield _ids(file.path, number, tokens[start:stop])
        start = stop


def _ids(path: Path, number: int, tokens: NDArray[Any]) -> Ids:
    blocks = (tokens[at : at + _BLOCK_TOKENS] for at in range(0, len(tokens), _BLOCK_TOKENS))
    return Ids(f"{path}: document {number}", blocks)


def _raw(path: Path, vocab_size: int) -> NDArray[Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(_HEADER_BYTES), dtype="<i4", count=min(3, size // 4)).tolist()
    kind = _HEADERS.get(tuple(header[:2])) if size >= _HEADER_BYTES else None
    if kind is not None:
        if size != _HEADER_BYTES + header[2] * kind.itemsize:
            raise InvalidInput(f"{path} has {size} bytes, and its header tells of {header[2]} tokens; fetch it again")
        return _mapped(path, kind, header[2], _HEADER_BYTES)
    kind = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    if size % kind.itemsize:
        raise InvalidInput(
            f"{path} has {size} bytes, which are no whole {kind.name} token ids; write it as {kind.name}"
        )
    return _mapped(path, kind, size // kind.itemsize, 0)


def _mapped(path: Path, kind: DTypeLike, count: int, offset: int) -> NDArray[Any]:
    """Array [count] of part of a file, of which only what is used is read."""
    # A plain view: slices of numpy's class for mapped files cost several times as much.
    return np.asarray(np.memmap(path, kind, "r", offset, (count,))) if count else np.empty(0, kind)


def _stops(tokens: NDArray[Any], eos: int | None) -> Iterator[int]:
    """The index behind the last token of each document."""
    if not len(tokens):
        return
    last = 0
    if eos is not None:
        leads = int(tokens[0]) == eos
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            found = start + np.flatnonzero(tokens[start : start + _BLOCK_TOKENS] == eos)
            for last in (found + (0 if leads else 1)).tolist():
                if last:
                    yield last
    if last < len(tokens):
        yield len(tokens)


@dataclass(frozen=True, slots=True)
class _Index:
    """Megatron's index of a `.bin`."""

    kind: np.dtype[Any]
    lengths: NDArray[np.int32]
    """[Q] tokens of each sequence."""
    pointers: NDArray[np.int64]
    """[Q] its first byte."""
    starts: NDArray[np.int64]
    """[D+1] first sequence of each document, then Q."""


def _indexed(path: Path, index_path: Path) -> Iterator[Ids]:
    index = _read_index(index_path)
    size = path.stat().st_size
    ends = index.pointers + index.lengths.astype(np.int64) * index.kind.itemsize
    if len(ends) and (index.lengths.min() < 0 or index.pointers.min() < 0 or int(ends.max()) > size):
        raise InvalidInput(f"{index_path} tells of tokens outside the {size} bytes of {path.name}; fetch both again")

    data = _mapped(path, "u1", size, 0)

    def sequences(start: int, stop: int) -> Iterator[NDArray[Any]]:
        for begin, end in zip(index.pointers[start:stop].tolist(), ends[start:stop].tolist(), strict=True):
            step = _BLOCK_TOKENS * index.kind.itemsize
            for at in range(begin, end, step):
                yield data[at : min(at + step, end)].view(index.kind)

    for number, (start, stop) in enumerate(zip(index.starts[:-1].tolist(), index.starts[1:].tolist(), strict=True)):
        yield Ids(f"{path}: document {number}", sequences(start, stop))


def _read_index(path: Path) -> _Index:
    wrong = InvalidInput(f"{path} is no index of Megatron's; convert the .bin, or take the .idx away if it is raw")
    head = len(_MEGATRON) + 8 + 1 + 8 + 8
    with path.open("rb") as file:
        data = file.read(head)
    if len(data) < head or not data.startswith(_MEGATRON):
        raise wrong
    version, code, count, documents = np.frombuffer(
        data[len(_MEGATRON) :], dtype=[("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("documents", "<u8")]
    )[0].tolist()
    if version != 1 or code not in _MEGATRON_TYPES:
        raise InvalidInput(f"{path} has version {version} and type {code}; version 1 and integer types can be read")
    if path.stat().st_size < head + 12 * count + 8 * documents:
        raise wrong
    starts = _mapped(path, "<i8", documents, head + 12 * count)
    if documents and (starts[0] != 0 or starts[-1] != count or np.any(np.diff(starts) < 0)):
        raise wrong
    return _Index(
        np.dtype(_MEGATRON_TYPES[code]),
        _mapped(path, "<i4", count, head),
        _mapped(path, "<i8", count, head + 4 * count),
        starts,
    )
