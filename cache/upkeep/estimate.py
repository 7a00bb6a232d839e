"""Estimate of what targets will take, before a teacher is started: bytes, objects, requests and money.

Bytes a position come from a table that was measured on SmolLM2-135M's exact targets over 113,108 positions of English
technical prose (V = 49,152; `python -m benchmarks.bench_size`), or from an existing cache (`measure`). Between the
measured K, bytes are interpolated linearly; for another vocabulary each kept or drawn id costs more bits per doubling
of V, as measured on synthetic teachers of V = 32k to 262k. What moves the result most is how flat a teacher's
distributions are and how many subjects the corpus has: `SPREAD`.

Shape legend:  P positions, K kept entries, V vocabulary size, N draws, S shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from potstill.cache.cache import Cache
from potstill.cache.corpus.writing import fitting_shard_positions
from potstill.cache.encoding import Encoding
from potstill.cache.encoding.fields import check_kept, stored_shapes
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import InvalidInput
from potstill.cache.targets import TargetSet
from potstill.cache.types import JSON, Fields

SPREAD: Mapping[str, float] = {"u8": 0.25, "archive": 0.4, "f16": 0.25, "f32": 0.25}
"""Relative error of the table. Synthetic teachers, whose text has no subject, take up to 20% more than SmolLM2, and 40%
more in `archive`, which learns from what the text repeats."""
LIKE_SPREAD = 0.05
"""Relative error where a cache with the same fields, vocabulary and encoding was measured."""

_TABLE_VOCAB = 49_152
_KS = (8, 16, 32, 64, 128, 256)
_TOP_K_BYTES: Mapping[str, Sequence[float]] = {
    "u8": (18.2, 32.5, 60.6, 117.0, 228.5, 459.5),
    "archive": (11.9, 21.6, 40.6, 77.6, 150.3, 294.9),
    "f16": (26.4, 48.1, 90.3, 170.2, 325.8, 623.4),
    "f32": (42.2, 76.2, 140.2, 268.1, 518.6, 1013.3),
}
"""Bytes a position of a committed segment at each of `_KS`, without the rank table."""
_BITS_PER_DOUBLING: Mapping[str, float] = {"u8": 0.45, "archive": 0.82, "f16": 0.45, "f32": 0.42}
"""Additional bits of a kept id when V is twice as large."""

_DRAWS = (10, 25, 50)
_UNIQUE = (5.1, 9.7, 15.7)
"""Unique ids among N draws; beyond, they grow with N to the power of 0.7, as from 25 to 50."""
_DRAW_BYTES: Mapping[bool, Sequence[float]] = {False: (7.8, 14.5, 23.1), True: (6.2, 11.9, 19.0)}
"""Bytes a position of N draws, plain or in `archive`; beyond, in proportion to the unique ids."""
_DRAW_BITS_PER_DOUBLING: Mapping[bool, float] = {False: 1.1, True: 1.8}
_FLOAT16_BYTES = 1.7
_FLOAT32_BYTES = 3.3
_DENSE_FRACTION = 0.75
"""Share of an entry's plain size, on synthetic teachers: the low bits of floats do not compress."""

_COMMIT_BYTES = (450, 160)
"""Bytes of a commit: fixed, and for each object of its segment."""
_MANIFEST_BYTES = (15_000, 100, 41)
"""Bytes of a manifest: fixed, for each shard, and for each object of a shard's segment."""
_MANIFEST_OBJECTS = 18
_RANK_OBJECTS = 6
_CLAIM_PUTS = 4
"""Requests for a shard's claim: creation, a few renewals, and its release."""
_GIBIBYTE = 2**30
_MOST = 10**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The targets to keep: positions, vocabulary, fields and teachers.

    Raises:
        InvalidInput: a number is below 1 or over 10**18, or K is over the vocabulary.
    """

    positions: int
    vocab_size: int
    fields: Fields
    teachers: int = 1
    shard_positions: int | None = None
    """None for those that `ingest` makes by itself."""

    def __post_init__(self) -> None:
        for name in ("positions", "vocab_size", "teachers", "shard_positions"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                raise InvalidInput(f"--{name.replace('_', '-')} is {value}; it must be 1 to {_MOST:,}")
        if self.fields.k > self.vocab_size:
            raise InvalidInput(f"--top-k is {self.fields.k}; the vocabulary has {self.vocab_size} ids")

    @property
    def shards(self) -> int:
        """Number of shards S of each teacher's target set."""
        return math.ceil(self.positions / (self.shard_positions or fitting_shard_positions(self.positions)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices in US dollars; by default those of S3 Standard in us-east-1 in 2025, without transfer."""

    gib_month: float = 0.023
    thousand_puts: float = 0.005

    def __post_init__(self) -> None:
        for name in ("gib_month", "thousand_puts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"a price is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Source of the bytes a position: the table, or a measured cache by which the table is scaled."""

    source: str
    factor: float = 1.0
    """Measured bytes divided by the table's for the same fields."""
    like: tuple[str, Fields, int] | None = None
    """Encoding, fields and vocabulary of the measured targets; None for the table itself."""

    def spread(self, encoding: str, workload: Workload) -> float:
        """Relative error that the bytes may have."""
        if self.like is None:
            return SPREAD[encoding]
        same = self.like == (encoding, workload.fields, workload.vocab_size)
        return LIKE_SPREAD if same else SPREAD[encoding]


# Size of one array's zarr.json.
_METADATA_BYTES = 1280

TABLE = Basis(source="measured on SmolLM2-135M, V=49,152, English technical prose")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimate for one encoding, all teachers together."""

    encoding: str
    bytes_per_position: float
    """Bytes a position of one teacher, records and rank table included."""
    spread: float
    num_bytes: int
    objects: int
    """Objects of segments, commits, specs, rank tables and manifests; claims are gone when a set is complete."""
    manifests: int
    write_requests: int
    """Puts until everything is written and folded."""
    month: float
    """US dollars for a month of storage."""
    write: float
    """US dollars for the requests to write."""

    def to_json(self) -> dict[str, JSON]:
        """A JSON object with one key per attribute, and the bytes at both ends of the spread."""
        low, high = (round(self.num_bytes * (1 + sign * self.spread)) for sign in (-1, 1))
        return {**asdict(self), "num_bytes_low": low, "num_bytes_high": high}


def estimate(workload: Workload, encoding: str, prices: Prices, basis: Basis = TABLE) -> Estimate:
    """Estimate what a workload takes in one encoding.

    Raises:
        InvalidInput: the encoding is unknown, or has no room for so many entries or draws.
    """
    check_kept(workload.fields, encoding_by_name(encoding))
    segment_objects = 2 * _arrays(workload.fields, encoding_by_name(encoding), workload.vocab_size) + 1
    ranked = bool(workload.fields.k or workload.fields.draws)
    segments = modelled_bytes(workload.fields, encoding, workload.vocab_size) * basis.factor
    records = _records_bytes(segment_objects, workload.shards) + ranked * _rank_table_bytes(workload.vocab_size)
    total = round(workload.teachers * (segments * workload.positions + records))
    objects = workload.teachers * (
        workload.shards * (segment_objects + 1) + 1 + ranked * _RANK_OBJECTS + _MANIFEST_OBJECTS
    )
    requests = objects + workload.teachers * workload.shards * _CLAIM_PUTS
    return Estimate(
        encoding=encoding,
        bytes_per_position=total / workload.positions / workload.teachers,
        spread=basis.spread(encoding, workload),
        num_bytes=total,
        objects=objects,
        manifests=workload.teachers,
        write_requests=requests,
        month=total / _GIBIBYTE * prices.gib_month,
        write=requests / 1000 * prices.thousand_puts,
    )


def modelled_bytes(fields: Fields, encoding: str, vocab_size: int) -> float:
    """Bytes a position of a segment, by the table."""
    doublings = math.log2(vocab_size / _TABLE_VOCAB)
    total = 0.0
    if fields.k:
        more = fields.k * _BITS_PER_DOUBLING[encoding] * doublings / 8
        # At least 2 bits an entry: below the table's K and V a straight line would reach zero.
        total += max(_interpolated(fields.k, _KS, _TOP_K_BYTES[encoding]) + more, fields.k / 4)
    if fields.draws:
        total += _draw_bytes(fields.draws, doublings, packed=encoding_by_name(encoding).packed)
    number = _FLOAT32_BYTES if encoding == "f32" else _FLOAT16_BYTES
    total += number * (fields.entropy + len(fields.temperatures) + 3 * fields.alignment)
    return total + (vocab_size * (4 if encoding == "f32" else 2) * _DENSE_FRACTION if fields.dense else 0.0)


def _draw_bytes(draws: int, doublings: float, *, packed: bool) -> float:
    within = min(draws, _DRAWS[-1])
    beyond = math.pow(draws / within, 0.7)
    more = _interpolated(within, _DRAWS, _UNIQUE) * _DRAW_BITS_PER_DOUBLING[packed] * doublings / 8
    return max(_interpolated(within, _DRAWS, _DRAW_BYTES[packed]) + more, 1.0) * beyond


def measure(cache: Cache, fields: Fields) -> Basis:
    """Compare a cache's targets with the table: those with `fields` if there are any, of these the most positions.

    Raises:
        InvalidInput: the cache holds no committed targets.
    """
    sets = [cache.targets(t, name) for name in cache.corpora() for t in cache.teachers(name)]
    found = [(held, *_stored(held)) for held in sets]
    whole = [(held, size, positions) for held, size, positions in found if positions]
    if not whole:
        raise InvalidInput(f"--like {cache.root.url!r} holds no committed targets; `potstill prefill` makes some")
    held, size, positions = max(whole, key=lambda item: (item[0].fields == fields, item[2]))
    name, vocab_size = held.encoding.name, held.identity.vocab_size
    per_position = size / positions
    return Basis(
        source=f"measured on {held.teacher}/{held.corpus.name} of {cache.root.url}: {per_position:.1f} bytes a "
        f"position in {name} over {positions:,} positions",
        factor=per_position / modelled_bytes(held.fields, name, vocab_size),
        like=(name, held.fields, vocab_size),
    )


def _stored(targets: TargetSet) -> tuple[int, int]:
    """Bytes of the committed segments, and the positions that they hold."""
    size = positions = 0
    starts = targets.corpus.shard_starts
    for shard in range(targets.corpus.num_shards):
        if targets.is_committed(shard):
            objects = (item for each in targets.sets for item in each.commits.require(shard).objects)
            # Chunks alone: metadata has one size in every segment, and would be most of a small one.
            size += sum(item.size for item in objects if "/c/" in item.path)
            positions += int(starts[shard + 1] - starts[shard])
    return size, positions


def _arrays(fields: Fields, encoding: Encoding, vocab_size: int) -> int:
    """Number of arrays of a segment, its checksums included."""
    other = stored_shapes(replace(fields, k=0) if not fields.only_top_k else fields, encoding, 1, vocab_size)
    if encoding.packed:
        draws = [name for name in other if name.startswith("draw_")]
        return 1 + 2 * bool(fields.k) + 2 * bool(draws) + len(other) - len(draws)
    return 1 + 4 * bool(fields.k) + len(other)


def _records_bytes(segment_objects: int, shards: int) -> int:
    """Bytes of commits, the manifest, and the metadata of the segments' arrays."""
    commits = shards * (
        _METADATA_BYTES * (segment_objects // 2) + _COMMIT_BYTES[0] + _COMMIT_BYTES[1] * segment_objects
    )
    return commits + _MANIFEST_BYTES[0] + shards * (_MANIFEST_BYTES[1] + _MANIFEST_BYTES[2] * segment_objects)


def _rank_table_bytes(vocab_size: int) -> float:
    """Bytes of a rank table: half of its plain size, as for SmolLM2; ids that no pilot row met are in order."""
    return vocab_size * math.log2(vocab_size) / 16


def _interpolated(at: int, places: Sequence[int], values: Sequence[float]) -> float:
    """Interpolate linearly between neighbours, and beyond the ends extend the line through the last two."""
    high = next((i for i, place in enumerate(places) if place >= at), len(places) - 1)
    high = max(high, 1)
    x0, x1, y0, y1 = places[high - 1], places[high], values[high - 1], values[high]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
