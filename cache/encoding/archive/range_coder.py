"""A range coder with adaptive frequency tables, compiled, which `archive.numbers` and `archive.ids` use.

It is the carrying coder of Martin 1979, "Range encoding", with a 64-bit range that puts out 32 bits at a time. Each
function codes in both directions, so that the encoder's and the decoder's models cannot drift apart: with
`coder.decoding` it takes the value from the stream, else it writes the value that it is given. Models use integers
only, so that every machine decodes the same. Compiled code checks no bounds: each loop here is bounded by its
arguments, and a stream that no encoder wrote sets `FAILED` and decodes to some value within its table.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potstill.cache.compiled import Function, compiled as compiled_with

Whole: TypeAlias = "int | np.signedinteger[Any]"

LOW, RANGE, CODE, UNIT = 0, 1, 2, 3
PLACE, FAILED = 0, 1
MAX_TOTAL = 1 << 31
"""Largest sum of the frequencies by which a symbol is coded."""
# A table adds this much for each symbol it meets, and halves all frequencies when their sum passes the limit: so recent
# symbols count more.
_STEP = 24
_LIMIT = 1 << 15


def compiled(function: Function) -> Function:
    """Compile a function to machine code that manages no memory."""
    return compiled_with(function, _nrt=False)


class Coder(NamedTuple):
    """A stream that is being written or read."""

    decoding: bool
    words: NDArray[np.uint32]
    registers: NDArray[np.uint64]
    """[4] `LOW`, `RANGE`, `CODE` and `UNIT`."""
    state: NDArray[np.int64]
    """[2] `PLACE`, index of the next word; `FAILED`, not zero when the stream cannot be right."""


def writer(capacity: int) -> Coder:
    """Make a coder that writes up to `capacity` words of 32 bits."""
    registers = np.array([0, 2**64 - 1, 0, 0], dtype=np.uint64)
    return Coder(False, np.empty(capacity, dtype=np.uint32), registers, np.zeros(2, dtype=np.int64))  # noqa: FBT003


def reader(words: NDArray[np.uint32]) -> Coder:
    """Make a coder that reads `words`, of which there must be two or more."""
    code = int(words[0]) << 32 | int(words[1])
    registers = np.array([0, 2**64 - 1, code, 0], dtype=np.uint64)
    return Coder(True, words, registers, np.array([2, 0], dtype=np.int64))  # noqa: FBT003


def finish(coder: Coder) -> NDArray[np.uint32]:
    """End the stream, and return its words."""
    place = int(coder.state[PLACE])
    assert not coder.state[FAILED]
    assert place + 2 <= len(coder.words), f"{len(coder.words)} words are too few"
    low = int(coder.registers[LOW])
    coder.words[place], coder.words[place + 1] = low >> 32, low & 0xFFFFFFFF
    return coder.words[: place + 2]


@compiled
def write(coder: Coder, before: int, frequency: int, total: int) -> None:
    """Write the symbol that has `frequency` of `total`, behind symbols that have `before` of it."""
    registers, words = coder.registers, coder.words
    unit = registers[RANGE] // np.uint64(total)
    low = registers[LOW] + unit * np.uint64(before)
    place = coder.state[PLACE]
    # The sum wrapped around: carry into the words that are written already.
    if low < registers[LOW]:
        i = place - 1
        while i > 0 and words[i] == np.uint32(0xFFFFFFFF):
            words[i] = np.uint32(0)
            i -= 1
        words[i] += np.uint32(1)
    width = unit * np.uint64(frequency)
    if width < np.uint64(1 << 32):
        if place >= len(words):
            coder.state[FAILED] = 1
            return
        words[place] = np.uint32(low >> np.uint64(32))
        coder.state[PLACE] = place + 1
        low <<= np.uint64(32)
        width <<= np.uint64(32)
    registers[LOW] = low
    registers[RANGE] = width


@compiled
def peek(coder: Coder, total: int) -> int:
    """Place of the next symbol in [0, total); `take` has to follow."""
    unit = coder.registers[RANGE] // np.uint64(total)
    # Kept for `take`, which needs the same quotient.
    coder.registers[UNIT] = unit
    target = np.int64(coder.registers[CODE] // unit)
    if target >= total or target < 0:
        coder.state[FAILED] = 1
        target = total - 1
    return target


@compiled
def take(coder: Coder, before: int, frequency: int) -> None:
    """Step over the symbol that was found by `peek`."""
    registers = coder.registers
    unit = registers[UNIT]
    code = registers[CODE] - unit * np.uint64(before)
    width = unit * np.uint64(frequency)
    if width < np.uint64(1 << 32):
        place = coder.state[PLACE]
        word = np.uint64(0)
        if place < len(coder.words):
            word = np.uint64(coder.words[place])
        else:
            coder.state[FAILED] = 1
        coder.state[PLACE] = place + 1
        code = code << np.uint64(32) | word
        width <<= np.uint64(32)
    registers[CODE] = code
    registers[RANGE] = width


@compiled
def code_evenly(coder: Coder, value: int, total: int) -> int:
    """Code a value in [0, total) where all are equally likely; `total` is at most `MAX_TOTAL`."""
    if coder.decoding:
        value = peek(coder, total)
        take(coder, value, 1)
    else:
        write(coder, value, 1, total)
    return value


def tables(count: int, symbols: int) -> NDArray[np.int32]:
    """Make adaptive tables [count, symbols + 1]: frequencies, all one at first, and in the last column their sum."""
    frequencies = np.ones((count, symbols + 1), dtype=np.int32)
    frequencies[:, symbols] = symbols
    return frequencies


@compiled
def code_symbol(coder: Coder, table: NDArray[np.int32], symbol: int) -> int:
    """Code a symbol by one row of `tables`, which adapts."""
    symbols = len(table) - 1
    total = np.int64(table[symbols])
    before = np.int64(0)
    if coder.decoding:
        target = peek(coder, total)
        symbol = 0
        while symbol < symbols - 1 and before + table[symbol] <= target:
            before += table[symbol]
            symbol += 1
        take(coder, before, np.int64(table[symbol]))
    else:
        for i in range(symbol):
            before += table[i]
        write(coder, before, np.int64(table[symbol]), total)
    _adapt(table, symbol)
    return symbol


@compiled
def _adapt(table: NDArray[np.int32], symbol: int) -> None:
    symbols = len(table) - 1
    table[symbol] += _STEP
    table[symbols] += _STEP
    if table[symbols] > _LIMIT:
        table[symbols] = 0
        for i in range(symbols):
            table[i] -= table[i] >> 1
            table[symbols] += table[i]


@compiled
def bit_length(value: int) -> int:
    """Number of bits of a value from 0 to 2**62."""
    length = 0
    while value >> length:
        length += 1
    return length


@compiled
def code_signed(coder: Coder, lengths: NDArray[np.int32], value: int) -> int:
    """Code a signed value below 2**30 in size: its length in bits and its sign by `lengths`, then its bits.

    `lengths` is a row of `tables` for `SIGNED_SYMBOLS` symbols.
    """
    size = abs(value)
    length = bit_length(size)
    symbol = code_symbol(coder, lengths, 2 * length + (1 if value < 0 else 0))
    length = symbol >> 1
    if length > 1:
        leading = 1 << (length - 1)
        size = leading + code_evenly(coder, size - leading, leading)
    else:
        size = length
    return -size if symbol & 1 else size


SIGNED_SYMBOLS = 62
