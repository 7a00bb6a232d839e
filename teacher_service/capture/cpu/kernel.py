"""The kernel that computes targets from float32 logits on a CPU, row by row, compiled by numba. See `capture.device`.

A row of logits stays in the core's own cache while the vocabulary is swept

    once    for the largest entry of each block of 64 ids
    once    for the sums of e and of e t, in the same blocks
    once    a temperature, for the sum of exp(t / T)

The top-k is found in the blocks whose largest entry is at or above a bound that at least k blocks reach: little more
than k entries, of which each is given its rank; equal ones by rising id. Draws look into the blocks that they hit only.

Sums inside a block are float32, those of blocks float64. The exponential is a minimax polynomial for 2**x, within
1.1e-7 and exact at 0; at and below 2**-126 it is 0. A row with a NaN, a +inf or nothing but -inf has NaN in all of its
floats, ids 0, and no draws.

Compiled code checks no bounds, so `fill` does.

Shape legend:  S rows, V vocabulary size, K kept entries, N draws, U unique ids drawn.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import numba
import numpy as np
from numpy.typing import NDArray

from potstill.cache.compiled import Function, compiled
from potstill.teacher_service.capture.layout import Drawn

_BLOCK = 64
_RANKED = 512
"""Most candidates that are ranked by comparing each with all, which vector instructions do; more are sorted."""
_HALVINGS = 24  # the bits of a float32's significand: further ones would hardly move the bound
_WIDTH = np.float32(16)
"""Nats below the largest entry within which the k-th is looked for first; then 16 times as many, and so on."""

_ZERO, _ONE, _LOG2_E = np.float32(0), np.float32(1), np.float32(1.4426950408889634)
_LOWEST = np.float32(-126)
"""Exponent at and below which a power of two counts as 0, because it is no normal float32."""
_MAGIC = np.float32(1.5 * 2**23)
"""Number whose sum with a small whole number has that number in its lowest bits."""
_ONE_BITS = np.int32(0x3F800000)  # of 1.0
# Coefficients of the minimax polynomial for 2**x - 1 on [-1/2, 1/2].
_C1, _C2, _C3 = np.float32(0.693147), np.float32(0.24022242), np.float32(0.055507336)
_C4, _C5 = np.float32(0.009671513), np.float32(0.0013264727)


_swept = partial(compiled, reordered=True)


def _inlined(function: Function) -> Function:
    """Inline a function into its callers before they are compiled, or their loops do not become vector instructions."""
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))


@_inlined
def _exp2(x: Any) -> Any:
    """2**x of one float32 that is at most 0; NaN of NaN."""
    held = _LOWEST if x < _LOWEST else x
    whole = np.rint(held)  # an instruction, which reordered sums cannot optimise away
    rest = held - whole
    series = ((((_C5 * rest + _C4) * rest + _C3) * rest + _C2) * rest + _C1) * rest + _ONE
    bits = (np.float32(whole + _MAGIC).view(np.int32) << np.int32(23)) + _ONE_BITS
    value = series * np.int32(bits).view(np.float32)
    return _ZERO if x <= _LOWEST else value


class Arrays(NamedTuple):
    """Arrays that are filled row by row; without elements where a field is not wanted."""

    top: NDArray[np.float32]
    """[S] the largest logprobs."""
    ids: NDArray[np.int32]
    """[S, K]"""
    logprobs: NDArray[np.float32]
    """[S, K]"""
    labels: NDArray[np.int64]
    """[S] ids whose logprob is wanted; read only."""
    label_logprob: NDArray[np.float32]
    """[S]"""
    entropy: NDArray[np.float32]
    """[S]"""
    temperatures: NDArray[np.float64]
    """Temperatures; read only."""
    log_z: NDArray[np.float32]
    """[S, temperatures]"""
    dense: NDArray[np.float32]
    """[S, V]"""
    uniforms: NDArray[np.float64]
    """[S, N] in [0, 1), rising in each row; read only."""


def fill(logits: NDArray[np.float32], arrays: Arrays) -> Drawn:
    """Fill every array, with K <= V, and return the draws.

    Args:
        logits: [S, V]; entries contiguous, rows any distance apart.
        arrays: of the same S rows.

    Raises:
        ValueError: shapes that do not belong together, or labels that are no ids.
    """
    _check(logits, arrays)
    num_rows, vocab_size = logits.shape
    stride = logits.strides[0] // logits.itemsize
    # A flat view of all rows: numba then knows that entries are contiguous, and makes vector instructions of the loops.
    flat = np.lib.stride_tricks.as_strided(logits, ((num_rows - 1) * stride + vocab_size,), (logits.itemsize,))
    most = arrays.uniforms.size
    drawn = Drawn(np.zeros(num_rows, np.int64), np.empty(most, np.int32), np.empty(most, np.int32))
    num_ids = _fill(flat, stride, arrays, drawn)
    return Drawn(drawn.lengths, drawn.ids[:num_ids].copy(), drawn.counts[:num_ids].copy())


def _check(logits: NDArray[np.float32], arrays: Arrays) -> None:
    num_rows, vocab_size = logits.shape
    k = arrays.ids.shape[1]
    labelled = num_rows if k else 0
    shapes = {
        "top": (arrays.top.shape, (num_rows,)),
        "ids": (arrays.ids.shape, (num_rows, k)),
        "logprobs": (arrays.logprobs.shape, (num_rows, k)),
        "labels": (arrays.labels.shape, (labelled,)),
        "label_logprob": (arrays.label_logprob.shape, (labelled,)),
        "entropy": (arrays.entropy.shape, (num_rows if len(arrays.entropy) else 0,)),
        "log_z": (arrays.log_z.shape, (num_rows, len(arrays.temperatures))),
        "dense": (arrays.dense.shape, (num_rows if len(arrays.dense) else 0, vocab_size)),
        "uniforms": (arrays.uniforms.shape[:1], (num_rows,)),
    }
    wrong = [f"{name} {shape}" for name, (shape, right) in shapes.items() if shape != right]
    if wrong or k > vocab_size or not 0 < vocab_size < 2**31 or not num_rows:
        raise ValueError(f"logits {logits.shape} and a top-{k} do not go with {', '.join(wrong) or 'each other'}")
    if logits.strides[1] != logits.itemsize or logits.strides[0] % logits.itemsize:
        raise ValueError(f"logits have strides {logits.strides}; a row's entries must be beside each other")
    if k and not 0 <= arrays.labels.min() <= arrays.labels.max() < vocab_size:
        raise ValueError(f"labels from {arrays.labels.min()} to {arrays.labels.max()} are no ids of {vocab_size}")


@_swept
def _fill(flat: Any, stride: int, arrays: Any, drawn: Any) -> Any:
    vocab_size = len(flat) - (len(arrays.top) - 1) * stride
    k = arrays.ids.shape[1]
    num_blocks = (vocab_size + _BLOCK - 1) // _BLOCK
    maxima, masses = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    keys = np.empty(vocab_size if k else 0, np.uint64)  # all entries may be equal, and then all are candidates
    inside = np.empty(_BLOCK, np.float64)
    num_ids = 0
    for row in range(len(arrays.top)):
        z = flat[row * stride : row * stride + vocab_size]
        highest = _maxima(z, maxima)
        total, weighted = _sums(z, highest, masses)
        log_total = np.log(total)
        arrays.top[row] = -log_total
        if k:
            arrays.label_logprob[row] = _logprob(z[arrays.labels[row]], highest, log_total)
            _top_k(z, highest, log_total, maxima, keys, arrays.ids[row], arrays.logprobs[row])
        if len(arrays.entropy):
            arrays.entropy[row] = log_total - weighted / total
        for column in range(len(arrays.temperatures)):
            inverse = 1.0 / arrays.temperatures[column]
            power = _power(z, highest, _LOG2_E * np.float32(inverse))
            arrays.log_z[row, column] = np.log(power) - log_total * inverse
        if len(arrays.dense):
            for i in range(vocab_size):
                arrays.dense[row, i] = _logprob(z[i], highest, log_total)
        if arrays.uniforms.shape[1] and not np.isnan(log_total):
            drawn.lengths[row] = _draw(z, highest, masses, arrays.uniforms[row], inside, drawn, num_ids)
            num_ids += drawn.lengths[row]
    return num_ids


@_swept
def _maxima(z: Any, maxima: Any) -> Any:
    """The largest entry of the row; fills `maxima` with that of each block."""
    full = len(z) // _BLOCK
    for block in range(full):
        maxima[block] = _largest(z, block * _BLOCK, block * _BLOCK + _BLOCK)
    if full < len(maxima):
        maxima[full] = _largest(z, full * _BLOCK, len(z))
    return _largest(maxima, 0, len(maxima))


@_inlined
def _largest(values: Any, start: int, stop: int) -> Any:
    largest = values[start]  # a NaN that is passed over here makes the sums NaN
    for i in range(start, stop):
        largest = values[i] if values[i] > largest else largest
    return largest


@_swept
def _sums(z: Any, highest: Any, masses: Any) -> Any:
    """Sum e and sum e t of the row, in float64; fills `masses` with the sum of e of each block."""
    total = weighted = 0.0
    full = len(z) // _BLOCK
    for block in range(full):
        mass, moment = _block_sums(z, highest, block * _BLOCK, block * _BLOCK + _BLOCK)
        masses[block] = mass
        total += mass
        weighted += moment
    if full < len(masses):
        mass, moment = _block_sums(z, highest, full * _BLOCK, len(z))
        masses[full] = mass
        total += mass
        weighted += moment
    return total, weighted * 0.6931471805599453  # ln 2: from powers of two to nats


@_inlined
def _block_sums(z: Any, highest: Any, start: int, stop: int) -> Any:
    """Sum e and sum e t of one block, t in powers of two."""
    mass = moment = _ZERO
    for i in range(start, stop):
        x = (z[i] - highest) * _LOG2_E
        e = _exp2(x)
        mass += e
        moment += e * (_LOWEST if x < _LOWEST else x)  # 0 * -inf of a masked id is nothing
    return mass, moment


@_swept
def _power(z: Any, highest: Any, factor: Any) -> Any:
    """Sum 2**((z - highest) factor) of the row, in float64."""
    total = 0.0
    full = len(z) // _BLOCK
    for start in range(0, full * _BLOCK, _BLOCK):
        total += _block_power(z, highest, factor, start, start + _BLOCK)
    return total + _block_power(z, highest, factor, full * _BLOCK, len(z))


@_inlined
def _block_power(z: Any, highest: Any, factor: Any, start: int, stop: int) -> Any:
    mass = _ZERO
    for i in range(start, stop):
        mass += _exp2((z[i] - highest) * factor)
    return mass


@compiled
def _logprob(logit: Any, highest: Any, log_total: Any) -> Any:
    """The logprob of one logit."""
    # In this order: in `highest + log_total` the larger one might swallow the smaller.
    return (np.float64(logit) - np.float64(highest)) - log_total


@_swept
def _top_k(z: Any, highest: Any, log_total: float, maxima: Any, keys: Any, ids: Any, logprobs: Any) -> None:
    """Fill ids and logprobs of one row."""
    k = len(ids)
    if np.isnan(log_total):
        ids[:] = 0
        logprobs[:] = np.nan
        return
    bound = _bound(maxima, k) if len(maxima) >= 2 * k else -np.inf
    if bound == -np.inf or _count(maxima, bound) > 2 * k:  # few blocks, or few with anything in them
        bound = _bound(z, k)
    found = _at_least(z, bound, maxima, keys)
    if found <= _RANKED:
        for i in range(found):
            rank = 0
            for j in range(found):
                rank += int(keys[j] < keys[i])
            if rank < k:
                ids[rank] = keys[i] & np.uint64(0xFFFFFFFF)
    else:
        keys[:found].sort()
        for rank in range(k):
            ids[rank] = keys[rank] & np.uint64(0xFFFFFFFF)
    for rank in range(k):
        logprobs[rank] = _logprob(z[ids[rank]], highest, log_total)


@_swept
def _bound(values: Any, k: int) -> Any:
    """A bound that k values, or a few more, are at or above: found by halving a range below the largest value."""
    high = values[0]
    for i in range(len(values)):
        high = values[i] if values[i] > high else high
    width = _WIDTH
    # Ends at the latest at an infinite width: every value is at or above -inf, as rows with a NaN do not come here.
    while _count(values, high - width) < k:
        width *= _WIDTH
    low = high - width
    if low == -np.inf:
        return low
    for _ in range(_HALVINGS):
        middle = low + (high - low) * np.float32(0.5)
        count = _count(values, middle)
        if count >= k:
            low = middle
            if count <= k + k // 16:
                break  # ranking a few entries more is cheaper than sweeping all values once more
        else:
            high = middle
    return low


@_inlined
def _count(values: Any, bound: Any) -> Any:
    count = np.int32(0)
    for i in range(len(values)):
        count += np.int32(values[i] >= bound)
    return count


@_swept
def _at_least(z: Any, bound: Any, maxima: Any, keys: Any) -> int:
    """Fill `keys` with the key of each entry at or above the bound; returns their number."""
    found = 0
    for block in range(len(maxima)):
        if maxima[block] >= bound:
            for i in range(block * _BLOCK, min(block * _BLOCK + _BLOCK, len(z))):
                if z[i] >= bound:
                    keys[found] = _key(z[i], i)
                    found += 1
    return found


@_inlined
def _key(value: Any, i: int) -> Any:
    """A sort key: it rises as the entry falls, and with the id where entries are equal."""
    bits = np.float32(value).view(np.int32) if value != 0 else np.int32(0)  # -0 equals 0
    falling = bits if bits < 0 else bits ^ np.int32(0x7FFFFFFF)
    return np.uint64(np.uint32(falling)) << np.uint64(32) | np.uint64(i)


@compiled
def _draw(z: Any, highest: Any, masses: Any, uniforms: Any, inside: Any, drawn: Any, start: int) -> int:
    """Fill ids and counts of one row's draws from `start` on; returns the number of unique ids."""
    total = 0.0
    for i in range(len(masses)):
        total += masses[i]
    block, begin, end = 0, 0.0, np.float64(masses[0])
    summed, place, first = -1, 0, 0
    mass = most = 0.0
    found = start
    for i in range(len(uniforms)):  # they rise, so that `block` and `place` only ever move on
        # A product that rounds up to all of the mass would fall behind the last id that has any.
        target = min(uniforms[i] * total, np.nextafter(total, 0.0))
        while end <= target:
            block += 1
            begin, end = end, end + masses[block]
        if summed != block:
            summed, place, first = block, 0, block * _BLOCK
            mass = 0.0
            for j in range(min(_BLOCK, len(z) - first)):
                mass += _exp2((z[first + j] - highest) * _LOG2_E)
                inside[j] = mass
            most = np.nextafter(mass, 0.0)
        # The float32 sum of a block and the float64 one of its ids differ by rounding: the same share of both is meant.
        share = min((target - begin) / (end - begin) * mass, most)
        while inside[place] <= share:
            place += 1
        if found > start and drawn.ids[found - 1] == first + place:
            drawn.counts[found - 1] += 1
        else:
            drawn.ids[found] = first + place
            drawn.counts[found] = 1
            found += 1
    return found - start
