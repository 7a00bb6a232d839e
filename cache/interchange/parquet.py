"""Parquet with list columns: one row per corpus row, for any reader of Parquet.

    column         type                                  at each position
    input_ids      list<uint32>                          the token itself
    loss_mask      list<bool>                            whether its target is to be learnt
    ids            list<fixed_size_list<uint32, K>>      the top-k by falling logprob
    logprobs       list<fixed_size_list<float, K>>       nats
    log_tail       list<float>                           log of the mass outside the top-k; -inf for none
    label_logprob  list<float>                           logprob of the next token; NaN for a row's last position
    entropy        list<float>                           nats
    log_z          list<fixed_size_list<float, T>>       log of the sum of p**(1/t) for each temperature t
    dense          list<fixed_size_list<float, V>>       all logprobs
    draw_ids       list<list<uint32>>                    unique ids of the draws, rising
    draw_counts    list<list<uint16>>                    number of times each was drawn

and `ends_document`, a bool a row: whether it is the last row of its document. A file has the columns of the target
set's fields only, and `loss_mask` and `ends_document` where the corpus has such. Its schema metadata names teacher,
encoding, tokenizer and rows (`interchange.formats.Origin`). Files made elsewhere are read too: they need `input_ids`,
`ids` and `logprobs`, of any integer and float types, in any order at a position. A missing `log_tail` is what the top-k
leaves of 1; a missing `label_logprob` is taken from the top-k, and is NaN where the label is not among them.

Shape legend:  P positions, K kept entries, T temperatures, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput
from potstill.cache.fields import COLUMNS
from potstill.cache.interchange.formats import Rows, RowSource
from potstill.cache.interchange.row_files import reading, require_columns
from potstill.cache.types import Draws, Fields, Targets

if TYPE_CHECKING:
    from potstill.cache.corpus import Corpus

_ENDS, _MASK = "ends_document", "loss_mask"
_TOP_K = ("ids", "logprobs")
_DRAWS = {"draw_ids": pa.list_(pa.uint32()), "draw_counts": pa.list_(pa.uint16())}
# Rounding of float32 logprobs, over a large vocabulary, moves their total mass from 1 by less than this.
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ListColumns:
    """The `RowFormat` of list columns."""

    fields: Fields
    vocab_size: int
    present: tuple[str, ...]
    """Columns of targets to write, or those of the files to read."""
    beside: tuple[str, ...] = ()
    """Those of `ends_document` and `loss_mask` that are there."""

    @classmethod
    def to_write(cls, fields: Fields, vocab_size: int, corpus: Corpus | None = None) -> ListColumns:
        """Choose the columns for a target set with these fields, and for what a corpus says of its rows."""
        said = {} if corpus is None else {_ENDS: corpus.spec.num_documents is not None, _MASK: corpus.has_loss_mask}
        beside = tuple(name for name, there in said.items() if there)
        return cls(fields=fields, vocab_size=vocab_size, present=_columns_of(fields), beside=beside)

    @property
    def token_columns(self) -> tuple[str, ...]:
        """See `RowFormat`."""
        return ("input_ids", *self.beside)

    @property
    def target_columns(self) -> tuple[str, ...]:
        """See `RowFormat`."""
        return ("input_ids", *self.present)

    def file_name(self, shard: int) -> str:
        """See `RowFormat`."""
        return f"shard-{shard:06d}.parquet"

    def schema(self) -> Any:
        """See `RowFormat`."""
        types = {name: pa.list_(pa.float32(), width) for name, width in self._widths().items()}
        types |= {"ids": pa.list_(pa.uint32(), self.fields.k), **_DRAWS}
        columns = [pa.field(name, pa.list_(types.get(name, pa.float32()))) for name in self.present]
        own = {_ENDS: pa.bool_(), _MASK: pa.list_(pa.bool_())}
        beside = [pa.field(name, own[name]) for name in self.beside]
        return pa.schema([pa.field("input_ids", pa.list_(pa.uint32())), *beside, *columns])

    def to_batch(self, rows: Rows, targets: Targets) -> Any:
        """See `RowFormat`."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32))
        columns = [pa.ListArray.from_arrays(offsets, pa.array(rows.tokens))]
        if _ENDS in self.beside:
            columns.append(pa.array(rows.ends_document))
        if _MASK in self.beside:
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(rows.loss_mask)))
        columns += [pa.ListArray.from_arrays(offsets, _position_values(name, targets)) for name in self.present]
        return pa.record_batch(columns, schema=self.schema())

    def rows(self, batch: Any, source: RowSource) -> Rows:
        """See `RowFormat`."""
        lengths, values = lists(batch, "input_ids", source)
        rows = Rows(lengths, token_ids(values, lengths, source, self.vocab_size))
        # Only of files that are read for their rows: those that are read for targets leave these columns out.
        beside = [name for name in self.beside if name in batch.schema.names]
        ends = _bools(batch.column(_ENDS), _ENDS, source) if _ENDS in beside else None
        mask = _bools(per_position(batch, _MASK, rows, source), _MASK, source) if _MASK in beside else None
        return replace(rows, ends_document=ends, loss_mask=mask)

    def targets(self, batch: Any, source: RowSource) -> Targets:
        """See `RowFormat`."""
        rows = self.rows(batch, source)
        columns: dict[str, Any] = {
            name: self._matrix(batch, name, width, rows, source) for name, width in self._widths().items()
        }
        for name in COLUMNS:
            if name in self.present:
                columns[name] = _floats(per_position(batch, name, rows, source), name, source)
        if "draw_ids" in self.present:
            columns["draws"] = self._draws(batch, rows, source)
        if not self.fields.k:
            return Targets.of_other_fields(len(rows.tokens), **columns)
        return self._finished(columns, rows, source)

    def _widths(self) -> dict[str, int]:
        """Columns with several numbers at a position, and how many that are."""
        shapes = {name: shape for name, shape in self.fields.float_shapes(1, self.vocab_size).items() if len(shape) > 1}
        widths = {**dict.fromkeys(_TOP_K, self.fields.k), **{name: shape[1] for name, shape in shapes.items()}}
        return {name: width for name, width in widths.items() if name in self.present}

    def _matrix(self, batch: Any, name: str, width: int, rows: Rows, source: RowSource) -> NDArray[Any]:
        """Read a column of lists of lists as [P, width]."""
        inner = per_position(batch, name, rows, source)
        widths, values = _inner_lists(inner, name, source)
        must = f"others {width}; every position must have as many"
        source.refuse_positions(
            widths != width, rows.lengths, lambda at: f"{name!r} has {widths[at]} entries at a position, {must}"
        )
        if name == "ids":
            return token_ids(values, rows.lengths * width, source, self.vocab_size).reshape(-1, width)
        return _floats(values, name, source).reshape(-1, width)

    def _draws(self, batch: Any, rows: Rows, source: RowSource) -> Draws:
        parts = {}
        for name in _DRAWS:
            widths, values = _inner_lists(per_position(batch, name, rows, source), name, source)
            parts[name] = (widths, token_ids(values, None, source, 2**16 if name == "draw_counts" else self.vocab_size))
        (widths, ids), (other, counts) = parts["draw_ids"], parts["draw_counts"]
        if not np.array_equal(widths, other):
            raise source.block_error("'draw_ids' and 'draw_counts' differ in length at a position; they must be equal")
        offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        return Draws(offsets, ids, counts.astype(np.uint16))

    def _finished(self, columns: dict[str, Any], rows: Rows, source: RowSource) -> Targets:
        ids, logprobs = columns["ids"], columns["logprobs"]
        nan = np.isnan(logprobs).any(axis=1)
        source.refuse_positions(nan, rows.lengths, lambda _: "'logprobs' has NaN; score the row again, or leave it out")
        if (logprobs[:, 1:] > logprobs[:, :-1]).any():
            ids, logprobs = by_falling_logprob(ids, logprobs)
        twice = "'ids' has an id twice at a position; each may be once"
        source.refuse_positions(repeats(ids), rows.lengths, lambda _: twice)
        if "log_tail" not in columns:
            columns["log_tail"] = implied_tail(logprobs)
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(columns["log_tail"].astype(np.float64))
        source.refuse_positions(
            ~(np.abs(mass - 1) <= MASS_TOLERANCE),
            rows.lengths,
            lambda at: (
                f"'logprobs' and 'log_tail' hold {mass[at]:.4f} of the mass, not 1; "
                "they must be natural logs of the full softmax at temperature 1"
            ),
        )
        if "label_logprob" not in columns:
            columns["label_logprob"] = labels_in_top_k(ids, logprobs, rows)
        return Targets(**{**columns, "ids": ids, "logprobs": logprobs})


def list_columns(path: Path, fields: Fields | None, vocab_size: int) -> ListColumns:
    """Choose the columns to read from files like `path`: those of `fields`, or when that is None those it has.

    Raises:
        InvalidInput: a column of these fields, or one that every file needs, is missing.
    """
    with reading(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if fields is None:
            present = tuple(name for name in (*_TOP_K, *COLUMNS) if name in names)
            require_columns(path, names, _TOP_K)
            fields = Fields(k=_first_width(file, path), entropy="entropy" in names)
        else:
            present = _columns_of(fields)
            require_columns(path, names, present)
    beside = tuple(name for name in (_ENDS, _MASK) if name in names)
    return ListColumns(fields=fields, vocab_size=vocab_size, present=present, beside=beside)


def require_alike(paths: Sequence[Path]) -> None:
    """Refuse files of which one has `ends_document` or `loss_mask` and another has not: its rows would all be learnt.

    Raises:
        InvalidInput: there are such.
    """
    having: dict[str, list[bool]] = {_ENDS: [], _MASK: []}
    for path in paths:
        with reading(path), pq.ParquetFile(path) as file:
            for name, found in having.items():
                found.append(name in file.schema_arrow.names)
    for name, found in having.items():
        if len(set(found)) > 1:
            has, lacks = paths[found.index(True)], paths[found.index(False)]
            raise InvalidInput(f"{has} has a column {name!r}, and {lacks} has none; add it there, or import one by one")


def _bools(values: Any, name: str, source: RowSource) -> NDArray[np.bool_]:
    """Read booleans, or whole numbers that are 0 for False, as other tools write masks."""
    if values.null_count or not (pa.types.is_boolean(values.type) or pa.types.is_integer(values.type)):
        raise source.block_error(f"column {name!r} holds {values.type} or nulls; it must hold booleans, or 0 and 1")
    return _numpy(values.cast(pa.bool_()))


def lists(batch: Any, name: str, source: RowSource) -> tuple[NDArray[np.int64], Any]:
    """Read a column of lists: the length of each, and all values one after the other.

    Raises:
        InvalidInput: the column has no lists, or has a null or an empty list.
    """
    column = batch.column(name)
    if not _is_list(column.type):
        raise source.block_error(f"column {name!r} is {column.type}; it must be a list per row")
    if column.null_count:
        row = int(np.argmax(_numpy(column.is_null())))
        raise source.error(row, f"column {name!r} is null; every row must have a list")
    lengths = _numpy(column.value_lengths()).astype(np.int64)
    if (lengths == 0).any():
        raise source.error(int(np.argmin(lengths)), f"column {name!r} is empty; every row must have a token")
    return lengths, column.flatten()


def per_position(batch: Any, name: str, rows: Rows, source: RowSource, *, like: str = "input_ids") -> Any:
    """Values of a column, one for each position as column `like` has them.

    Raises:
        InvalidInput: a row has another number of positions.
    """
    lengths, values = lists(batch, name, source)
    wrong = lengths != rows.lengths
    if wrong.any():
        row = int(wrong.argmax())
        raise source.error(row, f"{name!r} has {lengths[row]} positions, {like!r} {rows.lengths[row]}; must be equal")
    return values


def token_ids(values: Any, lengths: NDArray[np.int64] | None, source: RowSource, vocab_size: int) -> NDArray[np.uint32]:
    """Convert to token ids below `vocab_size`; `lengths` says how many belong to each row, for the error.

    Raises:
        InvalidInput: there is another type, a null, or a number outside the vocabulary.
    """
    if not pa.types.is_integer(values.type) or values.null_count:
        raise source.block_error(
            f"token ids are {values.type} with {values.null_count} nulls; they must be whole numbers"
        )
    ids = _numpy(values)
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        row = 0 if lengths is None else int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise source.error(
            row, f"id {ids[wrong[0]]} is outside the vocabulary of {vocab_size}; give the teacher's --vocab-size"
        )
    return ids.astype(np.uint32)


def by_falling_logprob(
    ids: NDArray[np.uint32], logprobs: NDArray[np.float32]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Sort ids and logprobs [P, K] by falling logprob; equal ones keep their order."""
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def repeats(ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Find the positions [P] of [P, K] ids that have an id twice."""
    ordered = np.sort(ids, axis=1)
    found: NDArray[np.bool_] = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    return found


def implied_tail(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log [P] of the mass that logprobs [P, K] leave of 1; -inf where they leave none."""
    # In float64: the difference of two numbers near 1 has few right digits in float32.
    left = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    tail = np.full(len(left), -np.inf)
    np.log(left, out=tail, where=left > 0)
    return tail.astype(np.float32)


def labels_in_top_k(ids: NDArray[np.uint32], logprobs: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    """Logprob [P] of each row's own next token; NaN where it is not among the top-k, and at a row's end."""
    following = np.roll(rows.tokens, -1)
    match = ids == following[:, None]
    found = match.any(axis=1)
    # The last position of a row would take the first token of the next row for its label.
    found[np.cumsum(rows.lengths) - 1] = False
    label = np.full(len(ids), np.nan, np.float32)
    label[found] = logprobs[match & found[:, None]]
    return label


def _columns_of(fields: Fields) -> tuple[str, ...]:
    top_k = (*_TOP_K, "log_tail", "label_logprob") if fields.k else ()
    return (*top_k, *fields.float_shapes(1, 1), *(_DRAWS if fields.draws else ()))


def _first_width(file: Any, path: Path) -> int:
    """K at the first position of a file."""
    source = RowSource(path, 0)
    batch = next(file.iter_batches(batch_size=1, columns=["ids"]))
    widths, _ = _inner_lists(lists(batch, "ids", source)[1], "ids", source)
    return int(widths[0])


def _position_values(name: str, targets: Targets) -> Any:
    if name in _DRAWS:
        draws = targets.draws
        assert draws is not None, "the fields said so"
        values = draws.ids if name == "draw_ids" else draws.counts
        return pa.ListArray.from_arrays(pa.array(draws.offsets.astype(np.int32)), pa.array(values))
    array = getattr(targets, name)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _inner_lists(values: Any, name: str, source: RowSource) -> tuple[NDArray[np.int64], Any]:
    if not _is_list(values.type) or values.null_count:
        raise source.block_error(f"column {name!r} has {values.type} at a position; it must be a list, without nulls")
    if pa.types.is_fixed_size_list(values.type):
        return np.full(len(values), values.type.list_size, np.int64), values.flatten()
    return _numpy(values.value_lengths()).astype(np.int64), values.flatten()


def _floats(values: Any, name: str, source: RowSource) -> NDArray[np.float32]:
    if not pa.types.is_floating(values.type) or values.null_count:
        raise source.block_error(f"column {name!r} is {values.type} with {values.null_count} nulls; it must be floats")
    return _numpy(values).astype(np.float32)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _numpy(values: Any) -> NDArray[Any]:
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array
