"""Reading of Parquet files forward, in blocks, as if their rows were one long file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from potstill.cache.errors import InvalidInput
from potstill.cache.interchange.formats import BLOCK_POSITIONS, Origin, RowFormat, Rows, RowSource
from potstill.cache.types import Targets


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file to read, whose rows are `first_row` to `first_row + num_rows` of the corpus."""

    path: Path
    num_rows: int
    first_row: int
    origin: Origin | None


def row_files(sources: Sequence[str | Path], columns: Sequence[str]) -> list[RowFile]:
    """List the Parquet files meant by `sources`, which are files or folders, by name; numbers in names sort as numbers.

    Rows are numbered through all files.

    Raises:
        InvalidInput: a source does not exist or has no Parquet file, a file lacks one of the `columns`, or there is no
            row at all.
    """
    found: list[RowFile] = []
    first = 0
    for path in _parquet_paths(sources):
        with reading(path), pq.ParquetFile(path) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            origin = Origin.from_metadata(path, file.schema_arrow.metadata)
        require_columns(path, names, columns)
        if num_rows:
            found.append(RowFile(path, num_rows, first, origin))
            first += num_rows
    if not found:
        raise InvalidInput(f"there is no row in {', '.join(map(str, sources))}; there is nothing to import")
    return found


def require_columns(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a file with columns `names` that lacks a needed one.

    Raises:
        InvalidInput: one is missing.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        has = ", ".join(names)
        raise InvalidInput(f"{path} has no column {missing[0]!r}; it has {has}: rename one, or give another --format")


def came_from(files: Sequence[RowFile], fingerprint: str) -> bool:
    """Tell whether all files were exported from the corpus with that fingerprint."""
    return all(file.origin is not None and file.origin.corpus["fingerprint"] == fingerprint for file in files)


def placed(files: Sequence[RowFile]) -> list[RowFile]:
    """Place exported files at the corpus rows from which they came, in order.

    Raises:
        InvalidInput: two files have the same rows.
    """
    firsts = [0 if file.origin is None else int(str(file.origin.shard["first_row"])) for file in files]
    moved = [RowFile(f.path, f.num_rows, first, f.origin) for f, first in zip(files, firsts, strict=True)]
    moved.sort(key=lambda file: file.first_row)
    for before, after in pairwise(moved):
        if before.first_row + before.num_rows > after.first_row:
            raise InvalidInput(f"{before.path} and {after.path} have the same rows; give one of them")
    return moved


class RowReader:
    """Reads rows of files forward, in blocks; going back opens the row group again. Not thread-safe."""

    def __init__(self, files: Sequence[RowFile], form: RowFormat) -> None:
        self._files = files
        self._form = form
        self._batches: Iterator[_RowBatch] = iter(())
        self._batch: _RowBatch | None = None

    def rows(self) -> Iterator[tuple[RowSource, int, Rows]]:
        """Read all rows in blocks: each with its source, the corpus row at which it begins, and its tokens."""
        for batch in self._open(self._files[0].first_row, self._form.token_columns):
            yield batch.source, batch.start, self._form.rows(batch.rows, batch.source)

    def holds(self, start: int, stop: int) -> bool:
        """Tell whether the files hold every row from `start` to `stop` of the corpus."""
        inside = (min(f.first_row + f.num_rows, stop) - max(f.first_row, start) for f in self._files)
        return sum(max(count, 0) for count in inside) == stop - start

    def targets(self, start: int, stop: int) -> Iterator[Targets]:
        """Read the targets of rows `start` to `stop` of the corpus, in blocks; the files must hold them.

        Raises:
            InvalidInput: the format refuses a row.
        """
        while start < stop:
            batch = self._find(start)
            offset = start - batch.start
            count = min(batch.rows.num_rows - offset, stop - start)
            source = RowSource(batch.source.path, batch.source.first_row + offset)
            yield self._form.targets(batch.rows.slice(offset, count), source)
            start += count

    def _find(self, row: int) -> _RowBatch:
        batch = self._batch
        if batch is None or not batch.start <= row < batch.group_stop:
            self._batches = self._open(row, self._form.target_columns)
            batch = next(self._batches)
        while row >= batch.start + batch.rows.num_rows:
            batch = next(self._batches)
        self._batch = batch
        return batch

    def _open(self, row: int, columns: Sequence[str]) -> Iterator[_RowBatch]:
        """Read blocks from the row group that has `row` to the end of the files."""
        for source in self._files:
            if source.first_row + source.num_rows <= row:
                continue
            with reading(source.path), pq.ParquetFile(source.path) as file:
                start = 0
                for group in range(file.num_row_groups):
                    about = file.metadata.row_group(group)
                    if source.first_row + start + about.num_rows > row:
                        yield from _group_batches(file, source, group, start, columns)
                    start += about.num_rows


@dataclass(frozen=True, slots=True)
class _RowBatch:
    source: RowSource
    start: int
    """First row of the block in the corpus."""
    group_stop: int
    """Corpus row at which the block's row group ends."""
    rows: Any
    """The Arrow record batch."""


def _group_batches(file: Any, source: RowFile, group: int, first: int, columns: Sequence[str]) -> Iterator[_RowBatch]:
    about = file.metadata.row_group(group)
    tokens = max(about.column(i).num_values for i in range(about.num_columns) if _is_tokens(about.column(i)))
    # pyarrow counts a batch in rows: from the row group's mean length, how many have about BLOCK_POSITIONS tokens.
    batch_rows = max(1, BLOCK_POSITIONS * about.num_rows // max(tokens, 1))
    stop = source.first_row + first + about.num_rows
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=list(columns)):
        yield _RowBatch(RowSource(source.path, first), source.first_row + first, stop, batch)
        first += batch.num_rows


def _is_tokens(column: Any) -> bool:
    return str(column.path_in_schema).partition(".")[0] == "input_ids"


def _parquet_paths(sources: Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = [p for p in source.rglob("*.parquet") if p.is_file() and not p.name.startswith(".")]
            if not inside:
                raise InvalidInput(f"folder {str(source)!r} holds no .parquet file")
            paths.extend(sorted(inside, key=_by_numbers))
        elif source.is_file():
            paths.append(source)
        else:
            raise InvalidInput(f"source {str(source)!r} does not exist")
    return paths


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    # DistillKit does not pad numbers: data_10 comes after data_9.
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors that pyarrow raises for a damaged file into one line that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as Parquet: {error}; write it again") from error
