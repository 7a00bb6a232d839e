"""The arrays of one segment: which there are for given fields, their chunks and compression, writing and reading.

    u8, f16, f32   ids, gaps | logprobs, log_tail, label_logprob (`potstill.cache.encoding.logprobs`)
    archive        coded, coded_starts: the same in packed blocks (`potstill.cache.targets.packed`)
    any            entropy, log_z, dense, draw_* (`potstill.cache.encoding.fields`)

Shape legend:  p positions of the segment, K kept entries, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding import Encoding, RankTable, decode
from potstill.cache.encoding.fields import RAGGED, decode_fields, encode_fields, ragged_length, stored_shapes
from potstill.cache.encoding.logprobs import StoredArrays, encode_measured
from potstill.cache.errors import CorruptSegment, FormatError
from potstill.cache.fields import COLUMNS, TOP_K
from potstill.cache.store import GroupReader, GroupWriter, Reading
from potstill.cache.store.chunks import ReadRequest, TiledArray, read_together
from potstill.cache.store.new_arrays import Layout
from potstill.cache.targets.packed import PackedReader, Text, encode_packed
from potstill.cache.types import Fields, Targets

# 128 KiB decoded, for 64 one-byte gaps or 32 two-byte ranks: small enough to read a single row, and large enough that
# zarr's cost per chunk does not show.
_CHUNK_POSITIONS = 2048
# Only ids are cut along K, so that reading the first 32 of 128 touches a quarter of their bytes. Up to 64 they are not:
# whole chunks read a fifth faster and are 1.4 % smaller.
_CHUNK_IDS = 32
_WHOLE_IDS = 64
_SCALAR_CHUNK = 1 << 15
_DENSE_CHUNK_ENTRIES = 1 << 18
_PACKED_CHUNK = 1 << 17

# Blosc's shuffle and zstd's level: the smallest on SmolLM2's targets that do not slow the writing of a segment much.
# Packed blocks are as good as random, so level 1.
_COMPRESSION: Mapping[str, tuple[Literal["noshuffle", "shuffle", "bitshuffle"], int]] = {
    "ids": ("bitshuffle", 6),
    "gaps": ("noshuffle", 7),
    "log_tail": ("shuffle", 7),
    "label_logprob": ("shuffle", 7),
    "entropy": ("shuffle", 7),
    "log_z": ("shuffle", 7),
    "alignment": ("shuffle", 7),
    "draw_gaps": ("shuffle", 7),
    "draw_counts": ("noshuffle", 7),
    "coded": ("noshuffle", 1),
    "draws_coded": ("noshuffle", 1),
}

_RANK_DTYPES = ("uint16", "uint32")
_FLOAT_DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """Arrays to store, and the error measured on the top-k."""

    arrays: StoredArrays
    error: dict[str, float]


class SegmentRange(NamedTuple):
    """A range of positions of one segment."""

    reader: SegmentReader
    start: int
    stop: int


def encode_segment(
    targets: Targets, fields: Fields, encoding: Encoding, ranks: RankTable, text: Text
) -> EncodedSegment:
    """Encode the targets of the rows `text` for a segment with `fields`.

    Raises:
        TeacherFailed: the targets are impossible (`check_targets`, `check_fields`).
    """
    if encoding.packed:
        return EncodedSegment(*encode_packed(targets, fields, encoding, ranks, text))
    arrays: StoredArrays = {}
    error: dict[str, float] = {}
    if fields.k:
        arrays, measured = encode_measured(targets, encoding, ranks)
        error = asdict(measured)
    return EncodedSegment({**arrays, **encode_fields(targets, fields, encoding, ranks)}, error)


def write_arrays(writer: GroupWriter, arrays: StoredArrays) -> None:
    """Write the arrays that `encode_segment` (or `potstill.cache.encoding.logprobs.encode`) made."""
    for name, array in arrays.items():
        writer.write(name, array, array_layout(name, array.shape))


def array_layout(name: str, shape: tuple[int, ...], object_positions: int | None = None) -> Layout:
    """Choose chunks and compression of an array; `object_positions` share an object, by default all."""
    shuffle, level = _COMPRESSION.get(name, ("bitshuffle", 5))
    return Layout(_chunk(name, shape), object_positions, shuffle, level)


def _chunk(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:
        return (_PACKED_CHUNK if name.endswith("coded") else _SCALAR_CHUNK,)
    if name == "dense":
        return (max(1, _DENSE_CHUNK_ENTRIES // shape[1]), shape[1])
    return (_CHUNK_POSITIONS, _CHUNK_IDS if name == "ids" and shape[1] > _WHOLE_IDS else max(shape[1], 1))


class SegmentReader:
    """Reads and decodes the targets of one segment, positions counted from its start; thread-safe."""

    def __init__(
        self,
        group: GroupReader,
        *,
        fields: Fields,
        encoding: Encoding,
        ranks: RankTable,
        text: Text,
        reading: Reading,
    ) -> None:
        self.group = group
        self.encoding = encoding
        self.ranks = ranks
        self._fields = fields
        self._num_positions = text.num_positions
        self._packed = None
        if encoding.packed:
            self._packed = PackedReader(group, fields, ranks, text, reading)
        elif fields.k:
            self._expect_top_k(fields.k)
        with _damage_named(self.group.path):
            self._expect_fields(self._plain_fields(fields))

    def top_k_names(self) -> tuple[str, ...]:
        """Names of the arrays of a top-k that is not packed."""
        return ("ids", "gaps" if self.encoding.name == "u8" else "logprobs", "log_tail", "label_logprob")

    def top_k_arrays(self) -> dict[str, TiledArray]:
        """The arrays of `top_k_names`."""
        return {name: self.group.array(name) for name in self.top_k_names()}

    def read_packed_top_k(self, start: int, stop: int) -> StoredArrays:
        """Read the arrays of `top_k_names`, with all K ids, from packed blocks."""
        assert self._packed is not None, "asked of a packed segment only"
        return self._packed.top_k(start, stop)

    def read_fields(self, start: int, stop: int, want: Fields) -> Targets:
        """Read the wanted fields beside the top-k.

        Raises:
            CorruptSegment: stored bytes are damaged, or decode to what no encoder writes.
        """
        with _damage_named(self.group.path):
            targets = decode_fields(
                self.group.read,
                range(start, stop),
                self._plain_fields(want),
                self.encoding,
                self.ranks,
                self._num_positions,
            )
            if self._packed is not None and want.draws:
                return replace(targets, draws=self._packed.draws(start, stop))
            return targets

    def read_column(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read one of `COLUMNS` alone, [P]."""
        if self._packed is not None and COLUMNS[name] is TOP_K:
            return self._packed.top_k(start, stop)[name].astype(np.float32)
        return self.group.read(name, start, stop).astype(np.float32)

    def _plain_fields(self, fields: Fields) -> Fields:
        """The fields that `potstill.cache.encoding.fields` reads here; it ignores k, but `Fields` may not be empty."""
        return replace(fields, k=max(fields.k, 1), draws=0 if self._packed is not None else fields.draws)

    def _expect_top_k(self, k: int) -> None:
        num_positions, group = self._num_positions, self.group
        group.expect("ids", (num_positions, k), _RANK_DTYPES)
        if self.encoding.name == "u8":
            group.expect("gaps", (num_positions, k - 1), ("uint8",))
        else:
            group.expect("logprobs", (num_positions, k), _FLOAT_DTYPES)
        for name in ("log_tail", "label_logprob"):
            group.expect(name, (num_positions,), _FLOAT_DTYPES)

    def _expect_fields(self, fields: Fields) -> None:
        shapes = stored_shapes(fields, self.encoding, self._num_positions, len(self.ranks.ids_by_rank))
        ragged = 0
        if "draw_starts" in shapes:
            self.group.expect("draw_starts", shapes["draw_starts"].shape, ("int64",))
            ragged = ragged_length(self.group.read_all("draw_starts"), fields, self._num_positions)
        for name, stored in shapes.items():
            shape = tuple(ragged if size == RAGGED else size for size in stored.shape)
            self.group.expect(name, shape, (stored.dtype,))


def read_segment_ranges(ranges: Sequence[SegmentRange], want: Fields) -> list[Targets]:
    """Read one `Targets` per range; all ranges are of one segment set, which must have the wanted fields.

    Raises:
        CorruptSegment: stored bytes are damaged, or decode to what no encoder writes.
    """
    targets = _read_top_k(ranges, want.k) if want.k else [None] * len(ranges)
    if want.only_top_k:
        return [part for part in targets if part is not None]
    others = [each.reader.read_fields(each.start, each.stop, want) for each in ranges]
    return [other if part is None else part.with_fields_of(other) for part, other in zip(targets, others, strict=True)]


def _read_top_k(ranges: Sequence[SegmentRange], k: int) -> list[Targets | None]:
    """Read all ranges together and decode them as one array: most of a short row's cost is the calls."""
    reader = ranges[0].reader
    if reader.encoding.packed:
        stored = [each.reader.read_packed_top_k(each.start, each.stop) for each in ranges]
        parts = {name: [part[name] for part in stored] for name in stored[0]}
    else:
        parts = _read_arrays(ranges, k)
    joined = {name: np.concatenate(those) if len(those) > 1 else those[0] for name, those in parts.items()}
    with _damage_named(", ".join(dict.fromkeys(each.reader.group.path for each in ranges))):
        targets = decode(joined, reader.encoding, reader.ranks, k=k)
        if not (targets.log_tail <= 0).all():
            raise FormatError("log_tail holds NaN or a tail of more than all mass")
    ends = np.cumsum([each.stop - each.start for each in ranges]).tolist()
    return [targets[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def _read_arrays(ranges: Sequence[SegmentRange], k: int) -> dict[str, list[NDArray[Any]]]:
    """Read the arrays of ranges, each by name: of ids only the chunks that `k` needs, of logprobs all K entries."""
    names = ranges[0].reader.top_k_names()
    arrays = {reader: reader.top_k_arrays() for reader in {each.reader for each in ranges}}
    # All gaps are needed, as a decoded top-k is scaled by the sum over its K entries.
    columns = {"ids": k}
    found = read_together(
        [ReadRequest(arrays[at][name], start, stop, columns.get(name)) for name in names for at, start, stop in ranges]
    )
    return {name: found[i * len(ranges) : (i + 1) * len(ranges)] for i, name in enumerate(names)}


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Turn what decoding refuses into `CorruptSegment`, with the segment's path in front."""
    try:
        yield
    except FormatError as error:
        raise CorruptSegment(f"{path}: {error}") from error
