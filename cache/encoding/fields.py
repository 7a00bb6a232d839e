"""Encoding of the fields beside the top-k (draws, entropy, log_z, dense) to stored arrays, and back. Pure numpy.

    array        shape              dtype                                  largest error, after decoding
    draw_gaps    [U]                uint16; uint32 if V > 2**16            0
    draw_counts  [U]                uint8; uint16 if N > 255               0
    draw_starts  [ceil(p/2048)+1]   int64: where each block's draws begin
    entropy      [p]                float16; float32 in `f32`              2**-11 of the value: 0.004 nats below 16
    log_z        [p, temperatures]  float16; float32 in `f32` or if any    0.004 nats
                                    temperature is below 0.5
    dense        [p, V]             float16; float32 in `f32`              0.016 nats down to -32 nats
    alignment    [p, 3]             float16; float32 in `f32`              2**-11 of the value

Draws are kept exactly. Within a position they are sorted by rising frequency rank; a gap is the number of ranks that
are skipped since the one before, and the first gap is the first rank itself. The counts of a position sum to N, which
shows where a position ends, so no lengths are stored. Decoding gives ids by rising token id.

At temperature T, log_z lies between 0 (one id has all mass) and (1 - 1/T) log V (all ids have the same mass). So it is
below 16 for T >= 0.5, where float16 rounds by 2**-8 at most; it grows without bound as T falls, and is float32 then.
Dense rows of float16 are scaled to a mass of 1 after decoding, which moves all entries of a row together.

Shape legend:  p positions of a segment, P positions read, V vocabulary size, N draws, U unique ids among the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potstill.cache.encoding.archive.blocks import MAX_K
from potstill.cache.encoding.draws import check_num_draws
from potstill.cache.encoding.logprobs import Encoding, RankTable, StoredArrays
from potstill.cache.errors import FormatError, InvalidInput, TeacherFailed
from potstill.cache.types import Draws, Fields, Targets

BLOCK_POSITIONS = 2048
"""Positions for each entry of `draw_starts`; the draws of a range are read in whole blocks of so many."""
RAGGED = -1
"""Placeholder in a shape for U, which `ragged_length` computes."""

ReadRange: TypeAlias = "Callable[[str, int, int], NDArray[Any]]"
"""Function `read(name, start, stop)` that reads a range on axis 0 of a stored array."""

# Draws are sorted as one integer each, in which a position has 16 bits.
_SORTED_POSITIONS = 2**16
# Numbers computed in float32 over a large vocabulary are off by about 1e-5, float16 ones by 4e-3; more is an error.
_ANSWER_SLACK = 1e-3
_STORED_SLACK = 1e-2
# Entries of `dense` that are converted to float64 at once: 32 MiB.
_DENSE_ENTRIES = 2**22


@dataclass(frozen=True, slots=True)
class StoredShape:
    """Shape and dtype that a stored array must have."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class FloatCodec:
    """Codec of a field of floats [p, ...], which are rounded to float16 except in encoding `f32`."""

    problem: Callable[[NDArray[Any], Fields, int, float], str]
    """Checks values, given the fields, V and a tolerance; describes what is impossible, or returns an empty string."""
    settled: Callable[[NDArray[Any], Fields, int], NDArray[np.float32]]
    """Moves rounded values, given the fields and V, to where `problem` accepts them without tolerance."""
    is_wide: Callable[[Fields], bool] = lambda _: False
    """Tells whether values can be too large for float16."""


def stored_shapes(fields: Fields, encoding: Encoding, num_positions: int, vocab_size: int) -> dict[str, StoredShape]:
    """Shapes of the arrays for `fields` without their top-k, by name; axis 0 of ragged arrays is `RAGGED`.

    Raises:
        LimitExceeded: there are more draws than can be kept.
    """
    shapes: dict[str, StoredShape] = {}
    if fields.draws:
        check_num_draws(fields.draws)
        shapes["draw_starts"] = StoredShape((-(-num_positions // BLOCK_POSITIONS) + 1,), "int64")
        shapes["draw_gaps"] = StoredShape((RAGGED,), "uint16" if vocab_size <= 2**16 else "uint32")
        shapes["draw_counts"] = StoredShape((RAGGED,), "uint8" if fields.draws <= 255 else "uint16")
    for name, shape in fields.float_shapes(num_positions, vocab_size).items():
        wide = encoding.name == "f32" or CODECS[name].is_wide(fields)
        shapes[name] = StoredShape(shape, "float32" if wide else "float16")
    return shapes


def ragged_length(draw_starts: NDArray[Any], fields: Fields, num_positions: int) -> int:
    """Number U of unique draws, from `draw_starts`, all of which are checked.

    Raises:
        FormatError: no draws can have these starts.
    """
    ends = np.minimum(np.arange(1, len(draw_starts)) * BLOCK_POSITIONS, num_positions)
    positions, held = np.diff(ends, prepend=0), np.diff(draw_starts)
    if draw_starts[0] != 0 or (held < positions).any() or (held > positions * fields.draws).any():
        raise FormatError(f"draw_starts are not those of {num_positions} positions of {fields.draws} draws each")
    return int(draw_starts[-1])


def encode_fields(targets: Targets, fields: Fields, encoding: Encoding, ranks: RankTable) -> StoredArrays:
    """Encode the arrays of `stored_shapes` for all positions of a segment; other fields are left out.

    Raises:
        TeacherFailed: a field is missing or impossible (`check_fields`).
    """
    check_fields(targets, fields, len(ranks.ids_by_rank))
    shapes = stored_shapes(fields, encoding, targets.num_positions, len(ranks.ids_by_rank))
    held = targets.only(fields).beside_top_k
    stored: StoredArrays = {name: held[name].astype(shapes[name].dtype) for name in CODECS if name in held}
    if targets.draws is not None and fields.draws:
        blocks = [_gaps_and_counts(part, ranks) for part in _parts(targets.draws)]
        for name, column in zip(("draw_gaps", "draw_counts"), zip(*blocks, strict=True), strict=True):
            stored[name] = np.concatenate(column).astype(shapes[name].dtype)
        stored["draw_starts"] = np.append(targets.draws.offsets[:-1:BLOCK_POSITIONS], targets.draws.offsets[-1])
    return stored


def decode_fields(
    read: ReadRange, positions: range, fields: Fields, encoding: Encoding, ranks: RankTable, num_positions: int
) -> Targets:
    """Read a range of a segment's `num_positions`, as targets without a top-k.

    Raises:
        FormatError: the arrays hold what no encoder writes.
    """
    vocab_size = len(ranks.ids_by_rank)
    decoded: dict[str, Any] = {}
    for name in fields.float_shapes(num_positions, vocab_size):
        values = read(name, positions.start, positions.stop)
        if problem := CODECS[name].problem(values, fields, vocab_size, _STORED_SLACK):
            raise FormatError(problem)
        exact = encoding.name == "f32"
        decoded[name] = values.astype(np.float32) if exact else CODECS[name].settled(values, fields, vocab_size)
    if fields.draws:
        decoded["draws"] = _read_draws(read, positions, fields.draws, ranks, num_positions)
    return Targets.of_other_fields(len(positions), **decoded)


def keeps(fields: Fields, encoding: Encoding) -> bool:
    """Tell whether the encoding has room for so many entries and draws at a position."""
    return not encoding.packed or max(fields.k, fields.draws) <= MAX_K


def check_kept(fields: Fields, encoding: Encoding) -> None:
    """Refuse more entries or draws at a position than the encoding has room for.

    Raises:
        InvalidInput: there are more.
    """
    if not keeps(fields, encoding):
        most = max(fields.k, fields.draws)
        raise InvalidInput(
            f"{encoding.name} keeps at most {MAX_K} entries or draws of a position, not {most}; take 'u8'"
        )


def check_fields(targets: Targets, fields: Fields, vocab_size: int) -> None:
    """Refuse fields that no distribution can have.

    Raises:
        TeacherFailed: a field is missing; entropy is outside [0, log V]; log_z is outside what its temperature allows;
            a dense row does not sum to 1; draws are not N with rising ids below V.
    """
    held = targets.beside_top_k
    missing = [each.name for each in fields.beside_top_k if each.name not in held]
    if missing:
        raise TeacherFailed(f"the teacher left out {', '.join(missing)}, which was asked for")
    if fields.draws:
        check_draws(held["draws"], fields.draws, vocab_size)
    for name, shape in fields.float_shapes(targets.num_positions, vocab_size).items():
        if held[name].shape != shape:
            raise TeacherFailed(f"the teacher answered {name} of shape {held[name].shape}, not {shape}")
        if problem := CODECS[name].problem(held[name], fields, vocab_size, _ANSWER_SLACK):
            raise TeacherFailed(problem)


def check_draws(draws: Draws, n: int, vocab_size: int) -> None:
    """Refuse draws that are not `n` at every position.

    Raises:
        LimitExceeded: `n` is more than can be kept. TeacherFailed: the draws are wrong.
    """
    check_num_draws(n)
    lengths = np.diff(draws.offsets)
    if len(draws.offsets) < 1 or draws.offsets[0] != 0 or (lengths < 1).any():
        raise TeacherFailed("the teacher answered a position without draws; its draws are not kept")
    if not len(lengths):
        return
    sums = np.add.reduceat(draws.counts.astype(np.int64), draws.offsets[:-1])
    if (sums != n).any() or not draws.counts.all():
        wrong = int(sums[np.argmax(sums != n)])
        raise TeacherFailed(f"the teacher answered {wrong} draws at a position, {n} were asked for; they are not kept")
    rises = np.diff(draws.ids.astype(np.int64)) > 0
    rises[draws.offsets[1:-1] - 1] = True
    if not rises.all():
        raise TeacherFailed("the teacher's drawn ids do not rise within a position; its draws are not kept")
    if int(draws.ids.max()) >= vocab_size:
        raise TeacherFailed(f"the teacher drew id {int(draws.ids.max())}, its vocabulary has {vocab_size}")


def _bounded(name: str, temperatures: Callable[[Fields], Sequence[float]]) -> FloatCodec:
    """Codec for numbers between 0 and (1 - 1/T) log V, for each temperature T."""

    def bounds(fields: Fields, vocab_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ends = (1.0 - 1.0 / np.array(temperatures(fields))) * np.log(vocab_size)
        return np.minimum(ends, 0.0), np.maximum(ends, 0.0)

    def problem(values: NDArray[Any], fields: Fields, vocab_size: int, slack: float) -> str:
        columns = values.reshape(len(values), len(temperatures(fields)))
        for i, (t, low, high) in enumerate(zip(temperatures(fields), *bounds(fields, vocab_size), strict=True)):
            if not _within(columns[:, i : i + 1], low, high, slack * max(1.0, 1.0 / t)):
                at = "" if t == math.inf else f" at temperature {t}"
                return f"{name}{at} is outside [{low:.3f}, {high:.3f}], all that a vocabulary of {vocab_size} can give"
        return ""

    def settled(values: NDArray[Any], fields: Fields, vocab_size: int) -> NDArray[np.float32]:
        low, high = (ends.astype(np.float32) for ends in bounds(fields, vocab_size))
        return np.clip(values.astype(np.float32).reshape(len(values), len(low)), low, high).reshape(values.shape)

    return FloatCodec(problem, settled, lambda fields: min(temperatures(fields)) < 0.5)


def _dense_problem(values: NDArray[Any], _: Fields, __: int, slack: float) -> str:
    sums = (np.exp(part).sum(axis=1) for part in _dense_parts(values))
    whole = all(_within(mass, 1.0, 1.0, slack) for mass in sums)
    return "" if whole else f"a dense row does not sum to 1 within {slack}"


def _within(values: NDArray[Any], low: float, high: float, slack: float) -> bool:
    """Tell whether all values are finite and in [low, high], give or take `slack`."""
    return bool(((values >= low - slack) & (values <= high + slack) & np.isfinite(values)).all())


def _dense_parts(dense: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    rows = max(1, _DENSE_ENTRIES // max(1, dense.shape[1]))
    for start in range(0, len(dense), rows):
        yield dense[start : start + rows].astype(np.float64)


def _scaled(dense: NDArray[Any], _: Fields, __: int) -> NDArray[np.float32]:
    """Scale rows to a mass of 1."""
    parts = [part - np.log(np.exp(part).sum(axis=1, keepdims=True)) for part in _dense_parts(dense)]
    return np.concatenate([np.empty((0, dense.shape[1]), np.float32), *(part.astype(np.float32) for part in parts)])


def _alignment_problem(values: NDArray[Any], _: Fields, __: int, slack: float) -> str:
    unresolved, logprob, tokens = values.T
    if not _within(unresolved, 0.0, 1.0, slack):
        return "an unresolved mass is outside [0, 1]"
    whole = np.isfinite(logprob).all() and (logprob <= slack).all() and (tokens >= 0).all()
    if not whole or not np.array_equal(tokens, np.rint(tokens)) or (logprob[tokens == 0] != 0).any():
        return "a chunk has no whole number of tokens, or a log-likelihood that is none"
    return ""


def _settled_alignment(values: NDArray[Any], _: Fields, __: int) -> NDArray[np.float32]:
    return np.clip(values.astype(np.float32), (0.0, -np.inf, 0.0), (1.0, 0.0, np.inf)).astype(np.float32)


CODECS: Mapping[str, FloatCodec] = {
    # The bounds of the entropy are those of log_z as its temperature grows without bound.
    "entropy": _bounded("entropy", lambda _: (math.inf,)),
    "log_z": _bounded("log_z", lambda fields: fields.temperatures),
    "dense": FloatCodec(_dense_problem, _scaled),
    "alignment": FloatCodec(_alignment_problem, _settled_alignment),
}
"""Codecs of the fields that are arrays of floats, by name."""


def _parts(draws: Draws) -> Iterator[Draws]:
    num_positions = len(draws.offsets) - 1
    for start in range(0, max(num_positions, 1), _SORTED_POSITIONS):
        yield draws[start : min(start + _SORTED_POSITIONS, num_positions)]


def _gaps_and_counts(draws: Draws, ranks: RankTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Gaps and counts [U] of at most 2**16 positions, by rising rank within a position."""
    codes, counts = _by_rising(draws.offsets, ranks.ranks_by_id[draws.ids], draws.counts)
    gaps = np.diff(codes, prepend=0) - 1
    first = draws.offsets[:-1]
    gaps[first] = codes[first]
    return gaps, counts


def _ranks_of_gaps(gaps: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks [U]: the running sum of gaps within each position."""
    steps = np.zeros(len(gaps) + 1, np.int64)
    np.cumsum(gaps.astype(np.int64) + 1, out=steps[1:])
    return steps[1:] - np.repeat(steps[offsets[:-1]], np.diff(offsets)) - 1


def _by_rising(
    offsets: NDArray[np.int64], numbers: NDArray[Any], counts: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort numbers below 2**32 within each of at most 2**16 positions, together with their counts."""
    # One integer of position, number and count: sorting those is several times faster than an argsort of two keys.
    packed = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(offsets)) << np.uint64(48)
    packed |= numbers.astype(np.uint64) << np.uint64(16)
    packed |= counts.astype(np.uint64)
    packed.sort()
    risen, theirs = packed >> np.uint64(16) & np.uint64(0xFFFFFFFF), packed & np.uint64(0xFFFF)
    return risen.astype(np.int64), theirs.astype(np.int64)


def _read_draws(read: ReadRange, positions: range, n: int, ranks: RankTable, num_positions: int) -> Draws:
    """Read the draws of a range of positions, from the whole blocks that hold it."""
    parts = [
        _read_blocks(read, range(start, min(start + _SORTED_POSITIONS, positions.stop)), n, ranks, num_positions)
        for start in range(positions.start, max(positions.stop, positions.start + 1), _SORTED_POSITIONS)
    ]
    return Draws.concat(parts)


def _read_blocks(read: ReadRange, positions: range, n: int, ranks: RankTable, num_positions: int) -> Draws:
    first, last = positions.start // BLOCK_POSITIONS, -(-positions.stop // BLOCK_POSITIONS)
    if not len(positions):
        return Draws(np.zeros(1, np.int64), np.empty(0, np.uint32), np.empty(0, np.uint16))
    starts = read("draw_starts", first, last + 1)
    begin, end = int(starts[0]), int(starts[-1])
    held = range(first * BLOCK_POSITIONS, min(last * BLOCK_POSITIONS, num_positions))
    if not 0 <= begin <= end <= begin + len(held) * n:
        raise FormatError(f"draw_starts put {end - begin} draws into {len(held)} positions of {n} each")
    gaps, counts = read("draw_gaps", begin, end), read("draw_counts", begin, end)
    if not len(gaps) == len(counts) == end - begin:
        raise FormatError(f"draw_starts name {end - begin} draws, draw_gaps has {len(gaps)}, draw_counts {len(counts)}")
    offsets = _ends(counts, len(held), n)[positions.start - held.start : positions.stop - held.start + 1]
    inside = slice(int(offsets[0]), int(offsets[-1]))
    return _draws(gaps[inside], counts[inside], offsets - offsets[0], ranks)


def _draws(gaps: NDArray[Any], counts: NDArray[Any], offsets: NDArray[np.int64], ranks: RankTable) -> Draws:
    codes = _ranks_of_gaps(gaps, offsets)
    if codes.size and int(codes.max()) >= len(ranks.ids_by_rank):
        raise FormatError(f"a drawn rank is {int(codes.max())}, the vocabulary has {len(ranks.ids_by_rank)}")
    ids, counts = _by_rising(offsets, ranks.ids_by_rank[codes], counts)
    return Draws(offsets, ids.astype(np.uint32), counts.astype(np.uint16))


def _ends(counts: NDArray[Any], num_positions: int, n: int) -> NDArray[np.int64]:
    """Offsets [P+1] of the positions, from counts that sum to `n` at each."""
    total = np.cumsum(counts, dtype=np.int64)
    offsets = np.zeros(num_positions + 1, np.int64)
    # No sum within a position is a multiple of n, as the counts of each position sum to n.
    whole = np.flatnonzero(total % n == 0) + 1
    if len(whole) != num_positions or not counts.all() or (len(total) and int(total[-1]) != num_positions * n):
        raise FormatError(f"stored counts do not make {n} draws at each of {num_positions} positions")
    offsets[1:] = whole
    return offsets
