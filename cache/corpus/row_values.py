"""One value for each row of a corpus, from a file: `.npy`, `.txt` (one a line) or Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput

_BOOLS = {"true": True, "false": False}
# Bounded, as `int` refuses thousands of digits with an error of its own.
_WHOLE = re.compile(r"[+-]?\d{1,400}")


def read_row_values(path: Path, column: str | None = None) -> NDArray[Any]:
    """Read bool, int or float values [R], in order; `column` chooses among several columns of a Parquet file.

    Text is bool if every line is `true` or `false`, int64 if every line is a whole number, else float64.

    Raises:
        InvalidInput: the file does not exist, or it or its values are of another kind.
    """
    readers: dict[str, Callable[[], NDArray[Any]]] = {
        ".npy": lambda: _npy(path),
        ".txt": lambda: _text(path),
        ".parquet": lambda: _parquet(path, column),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidInput(f"{str(path)!r} is not .npy, .txt or .parquet; convert it")
    if column is not None and path.suffix.lower() != ".parquet":
        raise InvalidInput(f"{str(path)!r} has no columns; leave --column {column} out")
    if not path.is_file():
        raise InvalidInput(f"there is no file {str(path)!r}")
    values = reader()
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise InvalidInput(f"{path} holds {values.dtype}{list(values.shape)}; give one bool, int or float a row")
    return values


def _npy(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise InvalidInput(f"{path} cannot be read as an array: {error}") from error


def _text(path: Path) -> NDArray[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if lines[-1] == "":
        lines.pop()
    words = [line.strip().lower() for line in lines]
    if words and all(word in _BOOLS for word in words):
        return np.array([_BOOLS[word] for word in words])
    # Checked before the dtypes are tried: as float64 a number this large would silently become another.
    whole = [number for number, word in enumerate(words, start=1) if _WHOLE.fullmatch(word)]
    if len(whole) == len(words) and (wide := [n for n in whole if not -(2**63) <= int(words[n - 1]) < 2**63]):
        raise InvalidInput(f"{path}:{wide[0]} is {words[wide[0] - 1]}; whole numbers go from -2^63 to 2^63 - 1")
    for dtype in (np.int64, np.float64):
        try:
            return np.array(words, dtype=np.str_).astype(dtype)
        except (ValueError, OverflowError):
            continue
    number = next(i for i, word in enumerate(words, start=1) if not _is_number(word))
    raise InvalidInput(f"{path}:{number} is {lines[number - 1]!r}; one number, or true or false, a line")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _parquet(path: Path, column: str | None) -> NDArray[Any]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = names[0] if column is None and len(names) == 1 else column
            if chosen not in names:
                what = "several columns" if column is None else f"no column {column!r}"
                raise InvalidInput(f"{path} has {what}; it has {', '.join(names)}: name one with --column")
            values = file.read(columns=[chosen]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as Parquet: {error}") from error
    if values.null_count:
        raise InvalidInput(f"{path}: column {chosen!r} has {values.null_count} nulls; give every row a value")
    return np.asarray(values.to_numpy())
