"""Encoding of top-k targets to stored arrays, and back. Pure functions of numpy arrays.

Ids become frequency ranks (`RankTable`), which compress better. Logprobs are kept in one of:

    name  stored                                               largest error in nats, after scaling
    u8    gaps between neighbours at 1/16 nat, [P, K-1] uint8   1/16 + 0.001; gaps over 15.9 nats saturate
    f16   the logprobs, [P, K] float16                          0.016 down to -32 nats
    f32   the logprobs, [P, K] float32                          0

`u8` quantises the running sum of the gaps, so that rounding never adds up: the distance of each entry to the top one
is within 1/32 nat. `u8` and `f16` then scale the decoded top-k to hold exactly 1 - tail; that moves all entries
together by at most another 1/32 nat, and gives the top logprob of `u8`, which is not stored. The extra 0.001 is the
float16 tail. `log_tail` and `label_logprob` are float16 (relative error 2**-11) in `u8` and `f16`, float32 in `f32`.
Everything is computed position by position, so batching changes no bit.

Shape legend:  P positions, K kept entries, V vocabulary size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.gaps import (
    BLOCK_ENTRIES,
    beyond_codes,
    decode_gaps,
    encode_gaps,
    is_compiled_faster,
    log1mexp,
)
from potstill.cache.errors import FormatError, InvalidInput, TeacherFailed
from potstill.cache.types import JSON, Targets, folded_tail

# The float16 number nearest to zero. A tail rounded to 0 would leave a top-k of no mass, which cannot be scaled.
_LEAST_LOG_TAIL = np.float16(-6e-8)
# Positions that are encoded and measured together: their float64 stays in a core's L2 cache.
_BLOCK = 2048
# float32 logprobs of a large vocabulary sum to 1 within about 1e-5; more means a broken teacher.
_MASS_TOLERANCE = 1e-3

StoredArrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to keep logprobs: its name, and the largest absolute error in nats that it promises."""

    name: str
    max_abs_error: float

    @property
    def packed(self) -> bool:
        """True when arrays are packed in blocks (`potstill.cache.encoding.archive.codec`), not stored one by one."""
        return self.name == "archive"

    def to_json(self) -> dict[str, JSON]:
        """Convert to `{"name", "max_abs_error"}`."""
        return {"name": self.name, "max_abs_error": self.max_abs_error}


ENCODINGS: Mapping[str, Encoding] = {
    "u8": Encoding("u8", 0.0635),
    "archive": Encoding("archive", 0.0635),
    "f16": Encoding("f16", 0.016),
    "f32": Encoding("f32", 0.0),
}


def encoding_by_name(name: str) -> Encoding:
    """Look up an encoding by its name.

    Raises:
        InvalidInput: there is none of this name.
    """
    if name not in ENCODINGS:
        raise InvalidInput(f"encoding {name!r} is unknown; known are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


@dataclass(frozen=True, eq=False)
class RankTable:
    """A permutation of the vocabulary: `ids_by_rank[r]` is the id stored as rank `r`."""

    ids_by_rank: NDArray[np.uint32]

    @classmethod
    def plain(cls, vocab_size: int) -> RankTable:
        """Make the table in which every id is its own rank."""
        return cls(np.arange(vocab_size, dtype=np.uint32))

    @classmethod
    def by_frequency(cls, top_ids: NDArray[np.uint32], tokens: NDArray[np.uint32], vocab_size: int) -> RankTable:
        """Rank ids by falling frequency in `top_ids`, ties by frequency in `tokens`, then by id."""
        in_top = np.bincount(top_ids.reshape(-1), minlength=vocab_size)
        in_text = np.bincount(tokens, minlength=vocab_size)
        return cls(np.lexsort((np.arange(vocab_size), -in_text, -in_top)).astype(np.uint32))

    @cached_property
    def ranks_by_id(self) -> NDArray[np.uint32]:
        """Inverse permutation [V]: `ranks_by_id[i]` is the rank of id `i`."""
        inverse = np.empty_like(self.ids_by_rank)
        inverse[self.ids_by_rank] = np.arange(len(self.ids_by_rank), dtype=np.uint32)
        return inverse

    @cached_property
    def sha256(self) -> str:
        """Hash of the permutation's little-endian bytes, in hex."""
        return hashlib.sha256(self.ids_by_rank.astype("<u4").tobytes()).hexdigest()

    @property
    def dtype(self) -> type[np.uint16 | np.uint32]:
        """Narrowest dtype that holds a rank."""
        return np.uint16 if len(self.ids_by_rank) <= 2**16 else np.uint32


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingError:
    """Error of decoded targets against the exact ones that were encoded."""

    max_abs: float
    """Largest |logprob difference| in nats over entries that did not saturate."""
    mean_abs: float
    mean_kl: float
    """Mean over positions of KL(exact || decoded) over the top-k and the tail bucket, in nats."""
    p999_kl: float
    saturated: int
    """Entries further than 15.9 nats below their neighbour, or of no mass at all."""
    saturated_mass: float
    """Exact probability mass of the saturated entries, averaged over positions."""


def encode(targets: Targets, encoding: Encoding, ranks: RankTable) -> StoredArrays:
    """Encode the arrays to store: `ids` (as ranks), `log_tail`, `label_logprob`, and `gaps` or `logprobs`.

    Raises:
        TeacherFailed: the targets are impossible (`check_targets`).
    """
    check_targets(targets, len(ranks.ids_by_rank))
    stored: StoredArrays = {"ids": _gathered(ranks.ranks_by_id, targets.ids).astype(ranks.dtype)}
    if encoding.name in ("u8", "archive"):
        stored["gaps"] = encode_gaps(targets.logprobs)
    else:
        with np.errstate(over="ignore"):  # below the range of float16: -inf, no mass
            stored["logprobs"] = targets.logprobs.astype(np.float32 if encoding.name == "f32" else np.float16)
    # A teacher's mass may exceed 1 by the tolerance; a log over 0 would be refused when it is read.
    tail, label = (np.minimum(logprob, np.float32(0.0)) for logprob in (targets.log_tail, targets.label_logprob))
    if encoding.name == "f32":
        stored["log_tail"], stored["label_logprob"] = tail, label
    else:
        stored["log_tail"] = np.minimum(targets.log_tail.astype(np.float16), _LEAST_LOG_TAIL)
        stored["label_logprob"] = label.astype(np.float16)
    return stored


def decode(
    stored: Mapping[str, NDArray[np.generic]], encoding: Encoding, ranks: RankTable, *, k: int | None = None
) -> Targets:
    """Decode what `encode` stored, within the encoding's error; the top `k` of each position, by default all.

    `ids` may have fewer columns than the logprobs, but at least `k`.

    Raises:
        FormatError: a rank is over the vocabulary.
    """
    codes = stored["ids"][:, :k]
    if codes.size and int(codes.max()) >= len(ranks.ids_by_rank):
        raise FormatError(f"a stored rank is {int(codes.max())}, the vocabulary has {len(ranks.ids_by_rank)}")
    log_tail = stored["log_tail"].astype(np.float32)
    if "gaps" in stored:
        logprobs = decode_gaps(stored["gaps"].astype(np.uint8, copy=False), log1mexp(log_tail.astype(np.float64)))
    elif encoding.name == "f16":
        logprobs = _from_float16(stored["logprobs"], log_tail)
    else:
        logprobs = stored["logprobs"].astype(np.float32)
    kept = codes.shape[1]
    if kept < logprobs.shape[1]:
        log_tail = folded_tail(log_tail, logprobs[:, kept:])
    return Targets(
        ids=_gathered(ranks.ids_by_rank, codes),
        logprobs=logprobs[:, :kept],
        log_tail=log_tail,
        label_logprob=stored["label_logprob"].astype(np.float32),
    )


def encode_measured(targets: Targets, encoding: Encoding, ranks: RankTable) -> tuple[StoredArrays, EncodingError]:
    """Encode the arrays to store, and measure their error; in blocks, so that memory stays near that of `targets`.

    Raises:
        TeacherFailed: as `encode`.
    """
    blocks: list[StoredArrays] = []
    measured = Measured()
    for start in range(0, targets.num_positions, _BLOCK):
        exact = targets[start : start + _BLOCK]
        blocks.append(encode(exact, encoding, ranks))
        measured.add(exact, decode(blocks[-1], encoding, ranks))
    stored = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return stored, measured.error()


@dataclass(slots=True)
class Measured:
    """Sums for the encoding error of positions that come block by block."""

    positions: int = 0
    entries: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    saturated: int = 0
    saturated_mass: float = 0.0
    kl: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, exact: Targets, decoded: Targets) -> None:
        """Add some positions."""
        p, q = exact.logprobs.astype(np.float64), decoded.logprobs.astype(np.float64)
        lost = beyond_codes(p)
        # No entry of a row may have mass, as after a projection; of float16 next to none comes back for each.
        none = np.isneginf(p) & ~np.isneginf(q)
        if none.any():
            lost = none if lost is None else lost | none
        difference = distances(p, q)
        difference = difference if lost is None else difference[~lost]
        self.positions += len(p)
        self.entries += difference.size
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        self.sum_abs += float(difference.sum())
        if lost is not None:
            self.saturated += int(lost.sum())
            self.saturated_mass += float(np.exp(p[lost]).sum())
        tails = exact.log_tail.astype(np.float64), decoded.log_tail.astype(np.float64)
        self.kl.append(kl_terms(p, q).sum(axis=1) + kl_terms(*tails))

    def error(self) -> EncodingError:
        """Error over all positions so far."""
        kl = np.concatenate(self.kl) if self.kl else np.zeros(1)
        return EncodingError(
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / max(self.entries, 1),
            mean_kl=float(kl.mean()),
            p999_kl=float(np.quantile(kl, 0.999)),
            saturated=self.saturated,
            saturated_mass=self.saturated_mass / max(self.positions, 1),
        )


def check_targets(targets: Targets, vocab_size: int) -> None:
    """Refuse targets that no distribution can have.

    Raises:
        TeacherFailed: a number is NaN, entries are unsorted, the mass is not 1, a label's logprob is over 0, or an id
            is over the vocabulary or twice at a position.
    """
    if np.isnan(targets.logprobs).any() or np.isnan(targets.log_tail).any():
        raise TeacherFailed("the teacher answered NaN logprobs; its targets are not kept")
    if (targets.logprobs[:, 1:] > targets.logprobs[:, :-1]).any():
        raise TeacherFailed("the teacher's entries are not sorted by falling logprob; they are not kept")
    mass = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(targets.log_tail.astype(np.float64))
    off = np.abs(mass - 1.0).max(initial=0.0)
    if off > _MASS_TOLERANCE:
        raise TeacherFailed(f"the teacher's top-k and tail sum to 1 only within {off:.1e}; they are not kept")
    if (targets.label_logprob > _MASS_TOLERANCE).any():
        raise TeacherFailed("the teacher answered a label's logprob over 0; its targets are not kept")
    check_ids(targets, vocab_size)
    ordered = np.sort(targets.ids, axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        repeated = int(ordered[:, 1:][twice][0])
        raise TeacherFailed(f"the teacher answered id {repeated} twice at a position; its targets are not kept")


def check_ids(targets: Targets, vocab_size: int) -> None:
    """Raise TeacherFailed for an id over V: the part of `check_targets` that is cheap on a whole shard."""
    if targets.ids.size and int(targets.ids.max()) >= vocab_size:
        raise TeacherFailed(f"the teacher answered id {int(targets.ids.max())}, its vocabulary has {vocab_size}")


def _gathered(table: NDArray[np.uint32], codes: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Look up `table[codes]` for codes [P, K] that were checked to be inside."""
    out = np.empty(codes.shape, np.uint32)
    # A teacher's own arrays may have a sign or another byte order, of which the compiled code knows nothing.
    if is_compiled_faster(codes.size) and codes.dtype in (np.uint16, np.uint32) and table.dtype == np.uint32:
        from potstill.cache.encoding.decode_kernels import gather  # noqa: PLC0415 -- numba takes half a second to import

        gather(table, np.ascontiguousarray(codes), out)
        return out
    # In blocks, which stay in a core's L2 cache: twice as fast.
    block = max(BLOCK_ENTRIES // max(codes.shape[1], 1), 1)
    for start in range(0, len(codes), block):
        np.take(table, codes[start : start + block].astype(np.intp), out=out[start : start + block], mode="clip")
    return out


def _from_float16(logprobs: NDArray[np.generic], log_tail: NDArray[np.float32]) -> NDArray[np.float32]:
    kept = log1mexp(log_tail.astype(np.float64))
    scaled = np.empty(logprobs.shape, np.float32)
    block = max(BLOCK_ENTRIES // max(logprobs.shape[1], 1), 1)
    for start in range(0, len(logprobs), block):
        part = slice(start, start + block)
        values = logprobs[part].astype(np.float64)
        mass = np.exp(values).sum(axis=1)
        # A position whose entries all have no mass stays so: there is nothing to scale.
        scale = np.where(mass > 0, kept[part] - np.log(np.where(mass > 0, mass, 1.0)), 0.0)
        np.add(values, scale[:, None], out=scaled[part], casting="same_kind")
    return scaled


def distances(p: NDArray[np.floating], q: NDArray[np.floating]) -> NDArray[np.float64]:
    """Absolute differences of logprobs in float64; 0 where neither has mass."""
    with np.errstate(invalid="ignore"):
        apart: NDArray[np.float64] = np.abs(p.astype(np.float64, copy=False) - q)
    if np.isnan(apart.max(initial=0.0)):
        apart[p == q] = 0.0
    return apart


def kl_terms(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Terms exp(p) * (p - q) of a KL divergence, zero where p has no mass."""
    # No mass in q where p has some counts as 1e-45, which keeps the sum finite.
    none = np.isneginf(p)
    terms: NDArray[np.float64] = (np.where(none, 0.0, p) if none.any() else p) - np.maximum(q, -103.0)
    terms *= np.exp(p.astype(np.float32))
    return terms
