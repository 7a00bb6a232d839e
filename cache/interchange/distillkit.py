"""DistillKit's compressed dataset: Parquet rows of `input_ids`, `compressed_logprobs`, `bytepacked_indices`.

Each position is a list of bytes, in the encoding that `compression_config.yaml` beside the files states
(`potstill.cache.interchange.distillkit_codec`). The format holds less than a cache does:

- The tail mass is not stored; it is what the top-k leaves of 1. A fit may hold more than 1, and need not fall with the
  rank: entries are sorted, and scaled to a mass of 1 where they exceed it.
- The label's logprob is not stored; it is taken from the top-k, and is NaN where the label is not among them.
- Entropy, log sums and draws are not exported.
- The teacher, its revision and its tokenizer are not named. Files of our export name them in their schema metadata,
  which DistillKit ignores; for other files they are given on the command line.
- A captured row has one target fewer than tokens: vLLM gives no logprobs of the first token, and DistillKit drops
  those after the last. The last token is then left out, as DistillKit's own `pack_logits` does. Packed rows, and the
  rows exported here, have as many targets as tokens, and its trainer takes them so.
- A rank that vLLM did not report has a logprob of -inf and an arbitrary id. It is given another, unused id.

Legacy rows (`packed_indices`, `exact_values`, `coeffs`) hold logits without their normaliser and cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from potstill.cache.errors import InvalidInput
from potstill.cache.interchange.distillkit_codec import (
    compress,
    decompress,
    index_bits,
    index_bytes,
    logprob_bytes,
    pack,
    unpack,
)
from potstill.cache.interchange.distillkit_config import CompressionConfig
from potstill.cache.interchange.formats import Rows, RowSource
from potstill.cache.interchange.parquet import (
    by_falling_logprob,
    implied_tail,
    labels_in_top_k,
    lists,
    per_position,
    repeats,
    token_ids,
)
from potstill.cache.interchange.row_files import require_columns
from potstill.cache.types import Targets

_LOGPROBS, _INDICES = "compressed_logprobs", "bytepacked_indices"
# A packed bit takes a whole byte while it is worked on; this many positions bound the memory for that.
_PACK_POSITIONS = 4096


@dataclass(slots=True)
class Scaled:
    """Count of positions whose decoded entries had a probability mass over 1, and the largest mass."""

    positions: int = 0
    most: float = 1.0


@dataclass(frozen=True, slots=True)
class CompressedRows:
    """The `RowFormat` of DistillKit's compressed rows."""

    config: CompressionConfig
    vocab_size: int
    scaled: Scaled = field(default_factory=Scaled)
    """Positions that were scaled down, counted while reading."""

    # The logprobs say how many positions have a target.
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", _LOGPROBS)
    target_columns: ClassVar[tuple[str, ...]] = ("input_ids", _LOGPROBS, _INDICES)

    def require_columns(self, path: Path) -> None:
        """Refuse a file of another format.

        Raises:
            InvalidInput: a column is missing, or the rows are of DistillKit's legacy format.
        """
        names = pq.read_schema(path).names
        if "packed_indices" in names:
            raise InvalidInput(
                f"{path} has DistillKit's legacy rows: logits without their normaliser; capture them again"
            )
        require_columns(path, names, self.target_columns)

    def file_name(self, shard: int) -> str:
        """See `RowFormat`."""
        return f"data_{shard}.parquet"

    def schema(self) -> Any:
        """See `RowFormat`; the types are DistillKit's."""
        of_bytes = pa.list_(pa.list_(pa.uint8()))
        columns = [("input_ids", pa.list_(pa.uint64())), (_LOGPROBS, of_bytes), (_INDICES, of_bytes)]
        return pa.schema([pa.field(name, kind) for name, kind in columns])

    def to_batch(self, rows: Rows, targets: Targets) -> Any:
        """See `RowFormat`."""
        kept = self.config.k
        logprobs = _in_parts(lambda part: compress(targets.logprobs[part, :kept], self.config), len(rows.tokens))
        bits = index_bits(self.config)
        indices = _in_parts(lambda part: pack(targets.ids[part, :kept], bits), len(rows.tokens))
        offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32))
        columns = [pa.ListArray.from_arrays(offsets, pa.array(rows.tokens.astype(np.uint64)))]
        columns += [pa.ListArray.from_arrays(offsets, _byte_lists(data)) for data in (logprobs, indices)]
        return pa.record_batch(columns, schema=self.schema())

    def rows(self, batch: Any, source: RowSource) -> Rows:
        """See `RowFormat`."""
        lengths, values = lists(batch, "input_ids", source)
        tokens = token_ids(values, lengths, source, self.vocab_size)
        with_target, _ = lists(batch, _LOGPROBS, source)
        wrong = np.flatnonzero((lengths != with_target) & (lengths != with_target + 1))
        if len(wrong):
            row = int(wrong[0])
            raise source.error(
                row, f"{lengths[row]} tokens and {with_target[row]} targets; there must be as many, or one less"
            )
        # Rows with one token more than targets lose their last one.
        keep = np.ones(len(tokens), bool)
        keep[np.cumsum(lengths)[lengths > with_target] - 1] = False
        return Rows(with_target, tokens[keep])

    def targets(self, batch: Any, source: RowSource) -> Targets:
        """See `RowFormat`."""
        rows = self.rows(batch, source)
        packed = self._bytes(batch, _INDICES, index_bytes(self.config), rows, source)
        compressed = self._bytes(batch, _LOGPROBS, logprob_bytes(self.config), rows, source)
        bits = index_bits(self.config)
        ids = _in_parts(lambda part: unpack(packed[part], bits, self.config.k), len(packed)).astype(np.uint32)
        logprobs = _in_parts(lambda part: decompress(compressed[part], self.config), len(packed))
        wrong = (np.isnan(logprobs) | np.isposinf(logprobs)).any(axis=1)
        what = f"{_LOGPROBS!r} decodes to NaN or inf; is this its compression config?"
        source.refuse_positions(wrong, rows.lengths, lambda _: what)
        ids, logprobs = by_falling_logprob(ids, logprobs)
        ids = _without_absent(ids, logprobs)
        self._check_ids(ids, rows, source)
        logprobs = self._within_one(logprobs)
        return Targets(
            ids=ids,
            logprobs=logprobs,
            log_tail=implied_tail(logprobs),
            label_logprob=labels_in_top_k(ids, logprobs, rows),
        )

    def _bytes(self, batch: Any, name: str, width: int, rows: Rows, source: RowSource) -> NDArray[np.uint8]:
        positions = per_position(batch, name, rows, source, like=_LOGPROBS)
        if not pa.types.is_nested(positions.type):
            raise source.block_error(f"column {name!r} has {positions.type} at a position; it must be a list of bytes")
        widths = positions.value_lengths().to_numpy(zero_copy_only=False)
        source.refuse_positions(
            widths != width,
            rows.lengths,
            lambda at: f"{name!r} has {widths[at]} bytes at a position, its compression config means {width}",
        )
        values = token_ids(positions.flatten(), rows.lengths * width, source, 256)
        return values.astype(np.uint8).reshape(-1, width)

    def _check_ids(self, ids: NDArray[np.uint32], rows: Rows, source: RowSource) -> None:
        outside = np.asarray((ids >= self.vocab_size).any(axis=1))
        source.refuse_positions(
            outside,
            rows.lengths,
            lambda at: (
                f"id {ids[at].max()} is outside the vocabulary of {self.vocab_size}; give the --vocab-size of "
                "the teacher and the d of its compression config"
            ),
        )
        twice = f"{_INDICES!r} has an id twice at a position; is d={self.config.d} right?"
        source.refuse_positions(repeats(ids), rows.lengths, lambda _: twice)

    def _within_one(self, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
        over = np.flatnonzero(mass > 1)
        if not len(over):
            return logprobs
        self.scaled.positions += len(over)
        self.scaled.most = max(self.scaled.most, float(mass[over].max()))
        scaled = logprobs.copy()
        scaled[over] = (logprobs[over] - np.log(mass[over])[:, None]).astype(np.float32)
        return scaled


def _without_absent(ids: NDArray[np.uint32], logprobs: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Replace ids whose logprob is -inf by unused ones, so that no id is twice at a position."""
    absent = np.isneginf(logprobs)
    for position in np.flatnonzero(absent.any(axis=1)):
        taken = set(ids[position, ~absent[position]].tolist())
        free = (number for number in range(len(taken) + int(absent[position].sum())) if number not in taken)
        ids[position, absent[position]] = [next(free) for _ in range(int(absent[position].sum()))]
    return ids


def _byte_lists(data: NDArray[np.uint8]) -> Any:
    offsets = pa.array((np.arange(len(data) + 1) * data.shape[1]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(data.reshape(-1)))


def _in_parts(work: Any, num_positions: int) -> NDArray[Any]:
    """Apply `work` to slices of positions, one after the other, and concatenate the results."""
    parts = range(0, num_positions, _PACK_POSITIONS)
    return np.concatenate([work(slice(start, start + _PACK_POSITIONS)) for start in parts])
