"""The arrays of the `archive` encoding: blocks of positions packed by `encoding.archive.codec`, one after the other.

    coded        [n] uint8   the blocks of the top-k       coded_starts        [blocks+1] int64   start of each block
    draws_coded  [n] uint8   the blocks of the draws       draws_coded_starts  [blocks+1] int64

A block is read and unpacked whole; unpacked blocks stay in the cache of decoded chunks.

Shape legend:  p positions of the segment, K kept entries, V vocabulary size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding import ENCODINGS, Encoding, RankTable, decode, encode
from potstill.cache.encoding.archive.blocks import NO_LABEL, Context
from potstill.cache.encoding.archive.codes import BLOCK_POSITIONS, DrawCodes, TopKCodes, canonical
from potstill.cache.encoding.fields import check_fields, encode_fields
from potstill.cache.encoding.logprobs import Measured, StoredArrays
from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.store import GroupReader, Reading
from potstill.cache.types import Draws, Fields, Targets, Tokens

TOP_K = "coded"
DRAWS = "draws_coded"
_TOP_K_ARRAYS = ("ids", "gaps", "log_tail", "label_logprob")
_DRAW_ARRAYS = ("offsets", "ids", "counts")


@dataclass(frozen=True, slots=True)
class Text:
    """The rows of a segment, which the models of the encoding look at: packing and unpacking need the same."""

    num_positions: int
    tokens: Callable[[int, int], Tokens]
    """Token ids of a range of the segment's positions."""
    row_starts: Callable[[], NDArray[np.int64]]
    """Positions [rows+1] at which the segment's rows start, then its end."""

    def context(self, start: int, stop: int, ranks: RankTable) -> Context:
        """Tokens, labels and row starts of a range of positions, as ranks."""
        # One token more than the range: the label of its last position.
        tokens = ranks.ranks_by_id[self.tokens(start, min(stop + 1, self.num_positions))]
        labels = np.full(stop - start, NO_LABEL, np.uint32)
        labels[: len(tokens) - 1] = tokens[1:]
        starts = self.row_starts()
        begins = np.zeros(stop - start + 1, np.bool_)
        begins[starts[(starts >= start) & (starts <= stop)] - start] = True
        labels[begins[1:]] = NO_LABEL
        return Context(tokens[: stop - start], labels, begins[:-1])


def encode_packed(
    targets: Targets, fields: Fields, encoding: Encoding, ranks: RankTable, text: Text
) -> tuple[StoredArrays, dict[str, float]]:
    """Encode a segment; returns its arrays, and the error measured on the top-k.

    Raises:
        TeacherFailed: the targets are impossible.
    """
    from potstill.cache.encoding.archive import codec  # noqa: PLC0415 -- numba takes a second to import

    check_fields(targets, fields, len(ranks.ids_by_rank))
    arrays: StoredArrays = {}
    error: dict[str, float] = {}
    vocab_size = len(ranks.ids_by_rank)
    if fields.k:
        measured = Measured()
        blocks = _top_k_blocks(targets, ranks, text, measured)
        arrays |= _joined(TOP_K, _on_all_cores(lambda block: codec.pack_top_k(*block, vocab_size), blocks))
        error = asdict(measured.error())
    if fields.draws:
        drawn = _draw_blocks(targets, ranks, text)
        arrays |= _joined(DRAWS, _on_all_cores(lambda block: codec.pack_draws(*block, fields.draws, vocab_size), drawn))
    # `Fields` refuses to be empty; `encode_fields` does not look at k.
    rest = replace(fields, k=max(fields.k, 1), draws=0)
    return {**arrays, **encode_fields(targets, rest, encoding, ranks)}, error


class PackedReader:
    """Reads and unpacks the blocks of one segment; thread-safe."""

    def __init__(
        self,
        group: GroupReader,
        fields: Fields,
        ranks: RankTable,
        text: Text,
        reading: Reading,
    ) -> None:
        self._group = group
        self._fields = fields
        self._ranks = ranks
        self._text = text
        self._chunks = reading.chunks
        held = {TOP_K: fields.k, DRAWS: fields.draws}
        self._starts = {name: self._read_starts(name) for name in held if held[name]}

    def top_k(self, start: int, stop: int) -> StoredArrays:
        """Read the top-k of a range of positions, as the arrays of encoding `u8`.

        Raises:
            CorruptSegment: a block is not what was committed, or decodes to what no encoder writes.
        """
        parts = [
            {key: array[max(start - low, 0) : stop - low] for key, array in block.items()}
            for low, block in self._blocks(TOP_K, start, stop, self._unpack_top_k)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def draws(self, start: int, stop: int) -> Draws:
        """Read the draws of a range of positions; raises as `top_k`."""
        parts = []
        for low, block in self._blocks(DRAWS, start, stop, self._unpack_draws):
            held = Draws(**cast("Any", block))
            parts.append(held[max(start - low, 0) : stop - low])
        return Draws.concat(parts)

    def _blocks(self, name: str, start: int, stop: int, unpack: _Unpack) -> Iterator[tuple[int, StoredArrays]]:
        """Read each block of a range: its first position, and its arrays."""
        blocks = range(start // BLOCK_POSITIONS, -(-stop // BLOCK_POSITIONS))
        for block, arrays in zip(
            blocks, _on_all_cores(lambda block: self._block(name, block, unpack), blocks), strict=True
        ):
            yield block * BLOCK_POSITIONS, arrays

    def _block(self, name: str, block: int, unpack: _Unpack) -> StoredArrays:
        keys = _TOP_K_ARRAYS if name == TOP_K else _DRAW_ARRAYS
        kept = {key: self._chunks.get((self._group.path, name, block, key)) for key in keys}
        arrays = {key: array for key, array in kept.items() if array is not None}
        if len(arrays) == len(keys):
            return arrays
        low = block * BLOCK_POSITIONS
        context = self._text.context(low, min(low + BLOCK_POSITIONS, self._text.num_positions), self._ranks)
        begin, end = (int(place) for place in self._starts[name][block : block + 2])
        try:
            arrays = unpack(self._group.read(name, begin, end).tobytes(), context)
        except FormatError as error:
            raise CorruptSegment(f"{self._group.path}/{name} block {block}: {error}") from error
        for key, array in arrays.items():
            self._chunks.put((self._group.path, name, block, key), array)
        return arrays

    def _unpack_top_k(self, data: bytes, context: Context) -> StoredArrays:
        from potstill.cache.encoding.archive import codec  # noqa: PLC0415 -- as in encode_packed

        codes = codec.unpack_top_k(data, context, self._fields.k, len(self._ranks.ids_by_rank))
        return _with_labels(codes, self._ranks)

    def _unpack_draws(self, data: bytes, context: Context) -> StoredArrays:
        from potstill.cache.encoding.archive import codec  # noqa: PLC0415 -- as in encode_packed

        codes = codec.unpack_draws(data, context, self._fields.draws, len(self._ranks.ids_by_rank))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(codes.lengths, dtype=np.int64)])
        ids = self._ranks.ids_by_rank[codes.ids]
        positions = np.repeat(np.arange(len(codes.lengths)), codes.lengths)
        # Packed draws are ordered by rank; `Draws` has the ids of a position rising.
        order = np.lexsort((ids, positions))
        return {"offsets": offsets, "ids": ids[order], "counts": codes.counts[order].astype(np.uint16)}

    def _read_starts(self, name: str) -> NDArray[np.int64]:
        blocks = -(-self._text.num_positions // BLOCK_POSITIONS)
        self._group.expect(f"{name}_starts", (blocks + 1,), ("int64",))
        starts = self._group.read_all(f"{name}_starts")
        self._group.expect(name, (int(starts[-1]),), ("uint8",))
        if starts[0] != 0 or (np.diff(starts) < 1).any():
            raise CorruptSegment(f"{self._group.path}/{name}_starts does not rise from 0")
        return starts


_Unpack: TypeAlias = Callable[[bytes, Context], StoredArrays]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def _with_labels(codes: TopKCodes, ranks: RankTable) -> StoredArrays:
    """Convert to the arrays of `u8`; where the label is one of the entries, it takes that entry's logprob."""
    stored: dict[str, NDArray[Any]] = {name: getattr(codes, name) for name in _TOP_K_ARRAYS}
    logprobs = decode(stored, ENCODINGS["u8"], ranks).logprobs
    positions = np.flatnonzero(codes.label_entry >= 0)
    labels = codes.label_logprob.astype(np.float32)
    labels[positions] = logprobs[positions, codes.label_entry[positions]]
    return {**stored, "label_logprob": labels}


def _on_all_cores(work: Callable[[_In], _Out], blocks: Iterable[_In]) -> Iterator[_Out]:
    """Apply `work` to each block in threads, as packing releases the GIL; results come in order, few blocks ahead."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        ahead: deque[Future[_Out]] = deque()
        for block in blocks:
            ahead.append(pool.submit(work, block))
            if len(ahead) > cores:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _top_k_blocks(
    targets: Targets, ranks: RankTable, text: Text, measured: Measured
) -> Iterator[tuple[TopKCodes, Context]]:
    for start in range(0, targets.num_positions, BLOCK_POSITIONS):
        exact = targets[start : start + BLOCK_POSITIONS]
        context = text.context(start, start + exact.num_positions, ranks)
        stored: dict[str, Any] = encode(exact, ENCODINGS["u8"], ranks)
        unknown = np.full(exact.num_positions, -1, np.int16)
        codes = canonical(TopKCodes(**{**stored, "ids": stored["ids"].astype(np.uint32)}, label_entry=unknown), context)
        measured.add(exact, decode(_with_labels(codes, ranks), ENCODINGS["u8"], ranks))
        yield codes, context


def _draw_blocks(targets: Targets, ranks: RankTable, text: Text) -> Iterator[tuple[DrawCodes, Context]]:
    assert targets.draws is not None, "checked by check_fields"
    for start in range(0, targets.num_positions, BLOCK_POSITIONS):
        draws = targets.draws[start : start + BLOCK_POSITIONS]
        codes = DrawCodes(np.diff(draws.offsets).astype(np.uint16), ranks.ranks_by_id[draws.ids], draws.counts)
        yield codes, text.context(start, start + len(codes.lengths), ranks)


def _joined(name: str, packed: Iterable[bytes]) -> StoredArrays:
    blocks = list(packed)
    starts = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
    return {name: np.frombuffer(b"".join(blocks), np.uint8), f"{name}_starts": starts}
