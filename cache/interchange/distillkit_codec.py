"""Codec of DistillKit's compressed logprobs, which its own code defines (`distillkit/compression`, Apache-2.0).

The `k` falling logprobs of a position become bytes, end to end: the first `exact_k` in `exact_dtype`; the coefficients
of a least-squares fit to the others over `polynomial_terms` of their rank, in `term_dtype`; then for each residual bin
a scale and its elements of `element_bits` bits, packed from the highest bit on, each bin padded to a byte. With
`delta_encoding` all of this is done to the differences of neighbours. Ids are packed with ceil(log2 d) bits each.

`decompress` equals DistillKit's decoder, its roundings to `exact_dtype` included. `compress` equals its encoder but
for the fit, which is solved in float64 here: DistillKit solves in float32 and drops small singular values, which
costs nats when `normalize_t` is off.

Shape legend:  P positions, K kept entries (`config.k`), A = K - exact_k approximated ones, N terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.errors import FormatError, InvalidInput
from potstill.cache.interchange.distillkit_config import CompressionConfig, ResidualBin

Fit = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]
"""Function from terms [A, N] and values [P, A] to coefficients [P, N]."""

_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Log of the smallest positive float32. A fit needs finite values, so it stands for -inf.
_LEAST_LOGPROB = np.float32(-103.0)


def least_squares(terms: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Solve for the coefficients in float64, by QR."""
    q, r = np.linalg.qr(terms.astype(np.float64))
    solved: NDArray[np.float64] = np.linalg.solve(r, q.T @ values.astype(np.float64).T).T
    return solved


def logprob_bytes(config: CompressionConfig) -> int:
    """Bytes of one position's compressed logprobs."""
    size = config.exact_k * _WIDTHS[config.exact_dtype] + len(config.polynomial_terms) * _WIDTHS[config.term_dtype]
    return size + sum(_WIDTHS[b.scale_dtype] + packed_bytes(b.num_elements, b.element_bits) for b in config.bins)


def index_bytes(config: CompressionConfig) -> int:
    """Bytes of one position's packed ids."""
    return packed_bytes(config.k, index_bits(config))


def index_bits(config: CompressionConfig) -> int:
    """Bits of an id; the logarithm is taken in float32, because DistillKit does so."""
    return int(np.ceil(np.log2(np.float32(config.d))))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(numbers: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Pack whole numbers [P, n] into bytes [P, ceil(n * bits / 8)], highest bit first; higher bits are dropped."""
    values = numbers.astype(np.int64)
    shifts = np.arange(bits - 1, -1, -1)
    spread = ((values[:, :, None] >> shifts) & 1).astype(np.uint8)
    return np.packbits(spread.reshape(len(values), -1), axis=1)


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Unpack the numbers [P, count] that `pack` packed."""
    spread = np.unpackbits(data, axis=1, count=count * bits).reshape(len(data), count, bits)
    numbers = np.zeros((len(data), count), np.int64)
    for bit in range(bits):
        numbers = (numbers << 1) | spread[:, :, bit]
    return numbers


def compress(logprobs: NDArray[np.float32], config: CompressionConfig, fit: Fit = least_squares) -> NDArray[np.uint8]:
    """Compress falling logprobs [P, K] to bytes [P, `logprob_bytes`].

    Raises:
        InvalidInput: the config's polynomial terms do not determine a fit.
    """
    left, terms = config.k - config.exact_k, config.polynomial_terms
    if len(set(terms)) < len(terms) or (left and len(terms) > left):
        raise InvalidInput(
            f"polynomial_terms is {list(terms)}; the k - exact_k = {left} entries are fitted by as many terms at most, "
            "each another one"
        )
    values = np.maximum(logprobs.astype(np.float32), _LEAST_LOGPROB)
    if config.delta_encoding:
        values = _deltas(values, diffused=config.error_diffusion)
    parts = [_to_bytes(values[:, : config.exact_k], config.exact_dtype)] if config.exact_k else []
    residual = values[:, config.exact_k :]
    if config.polynomial_terms:
        coefficients = _rounded(fit(_terms(config, "float32"), residual), config.term_dtype)
        parts.append(_to_bytes(coefficients, config.term_dtype))
        residual = residual - _fitted(config, coefficients).astype(np.float32)
    buffer = np.zeros(len(values), np.float32)
    start = 0
    for residual_bin in config.bins:
        block = residual[:, start : start + residual_bin.num_elements]
        scale, codes, buffer = _quantise(block, residual_bin, buffer, diffused=config.error_diffusion)
        parts += [_to_bytes(scale[:, None], residual_bin.scale_dtype), pack(codes, residual_bin.element_bits)]
        start += residual_bin.num_elements
    return np.concatenate(parts, axis=1)


def decompress(data: NDArray[np.uint8], config: CompressionConfig) -> NDArray[np.float32]:
    """Decompress bytes [P, `logprob_bytes`] to logprobs [P, K], which need not be sorted, as a fit need not fall.

    Raises:
        FormatError: a position has another number of bytes.
    """
    if data.shape[1] != logprob_bytes(config):
        raise FormatError(f"{data.shape[1]} bytes of logprobs, its config means {logprob_bytes(config)}")
    cursor = _Cursor(data)
    exact = cursor.floats(config.exact_k, config.exact_dtype)
    coefficients = cursor.floats(len(config.polynomial_terms), config.term_dtype)
    residual = np.zeros((len(data), config.k - config.exact_k), np.float64)
    start = 0
    for residual_bin in config.bins:
        scale = cursor.floats(1, residual_bin.scale_dtype)
        codes = unpack(
            cursor.take(packed_bytes(residual_bin.num_elements, residual_bin.element_bits)),
            residual_bin.element_bits,
            residual_bin.num_elements,
        )
        residual[:, start : start + residual_bin.num_elements] = _dequantised(codes, residual_bin) * scale
        start += residual_bin.num_elements
    values = _rounded(residual, config.exact_dtype)
    kept = config.exact_dtype
    if config.polynomial_terms:
        kept = _promoted(config.exact_dtype, config.term_dtype)
        values = _rounded(_fitted(config, coefficients) + values, kept)
    values = np.concatenate([exact, values], axis=1)
    if config.delta_encoding:
        values = _rounded(np.cumsum(values.astype(np.float32), axis=1), config.exact_dtype)
    return values.astype(np.float32)


class _Cursor:
    """A cursor that takes columns of bytes [P, n] from left to right."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        self._at += count
        return self._data[:, self._at - count : self._at]

    def floats(self, count: int, dtype: str) -> NDArray[np.float64]:
        taken = np.ascontiguousarray(self.take(count * _WIDTHS[dtype]))
        if dtype == "bfloat16":
            bits = taken.view("<u2").astype(np.uint32) << 16
            return bits.view(np.float32).astype(np.float64)
        return taken.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _deltas(logprobs: NDArray[np.float32], *, diffused: bool) -> NDArray[np.float32]:
    """The first logprob and the differences of neighbours; `diffused` adds each rounding error to the next one."""
    if not diffused:
        return np.concatenate([logprobs[:, :1], np.diff(logprobs, axis=1)], axis=1)
    exact = np.diff(logprobs.astype(np.float64), axis=1, prepend=0.0)
    rounded = np.empty_like(logprobs)
    error = np.zeros(len(logprobs))
    for column in range(exact.shape[1]):
        current = exact[:, column] + error
        rounded[:, column] = current
        error = current - rounded[:, column]
    return rounded


def _terms(config: CompressionConfig, dtype: str) -> NDArray[np.float32]:
    """The terms [A, N] at every rank, computed in `dtype`."""
    count = config.k - config.exact_k
    kind = np.float64 if dtype == "float64" else np.float32
    points = (_unit_points(count, dtype) if config.normalize_t else _rounded(np.arange(count), dtype)).astype(kind)
    functions = {"sqrt": np.sqrt, "exp": np.exp}
    with np.errstate(over="ignore", divide="ignore"):
        columns = [functions[t](points) if isinstance(t, str) else points**t for t in config.polynomial_terms]
        terms: NDArray[np.float32] = _rounded(np.stack(columns, axis=-1), dtype).astype(kind)
    if not np.isfinite(terms).all():
        raise FormatError(f"polynomial_terms {list(config.polynomial_terms)} are not finite up to rank {count}")
    return terms


def _unit_points(count: int, dtype: str) -> NDArray[np.float64]:
    """Points [count] from 0 to 1, bit for bit as `torch.linspace` has them: a rounded step, counted from both ends."""
    step = _rounded(np.array(1 / max(count - 1, 1)), dtype)
    rank = np.arange(count)
    from_ends = step * np.minimum(rank, count - 1 - rank)
    if dtype in ("float16", "bfloat16"):
        from_ends = _rounded(from_ends, dtype)
    return _rounded(np.where(rank < count // 2, from_ends, 1 - from_ends), dtype)


def _fitted(config: CompressionConfig, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values [P, A] of the polynomial, summed in `term_dtype` (in float32 for 16-bit ones) as DistillKit does."""
    dtype = config.term_dtype
    kind: Any = np.float64 if dtype == "float64" else np.float32
    terms = _terms(config, dtype)
    total = np.zeros((len(coefficients), len(terms)), kind)
    for column in range(terms.shape[1]):
        product = coefficients[:, column, None].astype(kind) * terms[:, column]
        total += _rounded(product, dtype).astype(kind)
    return _rounded(total, dtype)


def _quantise(
    values: NDArray[np.float32], residual_bin: ResidualBin, buffer: NDArray[np.float32], *, diffused: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float32]]:
    """Quantise one bin: scale [P], codes [P, n] from 0 on, and the error [P] to add to the next bin."""
    low, high = _code_range(residual_bin.element_bits)
    largest = np.abs(values).max(axis=1)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(max(-low, 1)))
    stored = _rounded(scale, residual_bin.scale_dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.nan_to_num(values / stored[:, None].astype(np.float32), nan=0.0)
    if not diffused:
        codes = np.clip(np.rint(scaled), np.float32(low), np.float32(high)) - np.float32(low)
        return stored, codes.astype(np.int64), np.zeros_like(buffer)
    codes = np.empty_like(scaled)
    for column in range(scaled.shape[1]):
        current = scaled[:, column] + buffer
        nearest = np.clip(np.rint(current), np.float32(low), np.float32(high))
        buffer = current - nearest
        codes[:, column] = nearest - np.float32(low)
    return stored, codes.astype(np.int64), buffer


def _dequantised(codes: NDArray[np.int64], residual_bin: ResidualBin) -> NDArray[np.float64]:
    if residual_bin.element_bits == 1:
        return codes.astype(np.float64) * 2 - 1
    low, _ = _code_range(residual_bin.element_bits)
    return (codes + low).astype(np.float32).astype(np.float64)


def _code_range(bits: int) -> tuple[int, int]:
    return (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _promoted(a: str, b: str) -> str:
    """The float type that holds both, as torch promotes them."""
    if a == b:
        return a
    return "float64" if "float64" in (a, b) else "float32"


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Round to the nearest numbers of `dtype`, returned as float64."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return (_bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return values.astype(np.dtype(dtype)).astype(np.float64)


def _to_bytes(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Convert [P, n] to little-endian bytes [P, n * width]."""
    with np.errstate(over="ignore"):
        stored = _bfloat16_bits(values) if dtype == "bfloat16" else values.astype(np.dtype(dtype).newbyteorder("<"))
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(values), -1)


def _bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper 16 bits of float32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2")
