"""Export to Parquet files of one row per corpus row, and what every format of such files shares.

Export writes one file a shard under a temporary name and renames it; import reads files forward and fills a target
set shard by shard. Both go on where they stopped: a finished file is skipped, a committed shard is not read again.
A `RowFormat` decides on the columns (`interchange.parquet`, `interchange.distillkit`).

Shape legend:  P positions, R rows of a file or block.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from potstill.cache.errors import FormatError, InvalidInput, NotCommitted, SpecMismatch
from potstill.cache.plurals import counted
from potstill.cache.row_batches import row_batches
from potstill.cache.store.local_files import fsync
from potstill.cache.store.root import store_errors
from potstill.cache.targets import TargetSet
from potstill.cache.types import JSON, Fields, Provenance, Targets, TeacherIdentity

BLOCK_POSITIONS = 32_768
"""Most positions that are converted together, except that a row is never cut."""
_VERSION = "1"
_VERSION_KEY = b"potstill.rows"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tokens of several rows."""

    lengths: NDArray[np.int64]
    """[R] tokens of each row, at least 1."""
    tokens: NDArray[np.uint32]
    """[P] token ids, row after row."""
    ends_document: NDArray[np.bool_] | None = None
    """[R] whether each row is the last one of its document; None where nobody says."""
    loss_mask: NDArray[np.bool_] | None = None
    """[P] whether each target is to be learnt; None for all."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """The file and row at which a block of rows begins, for error messages."""

    path: Path
    first_row: int

    def error(self, row: int, what: str) -> InvalidInput:
        """Make the error that says `what` is wrong with row number `row` of the block."""
        return InvalidInput(f"{self.path} row {self.first_row + row}: {what}")

    def block_error(self, what: str) -> InvalidInput:
        """Make the error that says `what` is wrong with the block as a whole."""
        return InvalidInput(f"{self.path}, rows {self.first_row} on: {what}")

    def refuse_positions(
        self, wrong: NDArray[np.bool_], lengths: NDArray[np.int64], what: Callable[[int], str]
    ) -> None:
        """Raise the error of the first position [P] where `wrong` is true, if any; `lengths` [R] are the rows'."""
        if wrong.any():
            position = int(wrong.argmax())
            raise self.error(int(np.searchsorted(np.cumsum(lengths), position, side="right")), what(position))


class RowFormat(Protocol):
    """Conversion between rows with their targets and the columns of a Parquet file."""

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns that `rows` needs."""

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The columns that `targets` needs."""

    def file_name(self, shard: int) -> str:
        """Name of a shard's file."""

    def schema(self) -> Any:
        """The Arrow schema that is written."""

    def to_batch(self, rows: Rows, targets: Targets) -> Any:
        """Convert rows and their targets to a record batch of `schema`."""

    def rows(self, batch: Any, source: RowSource) -> Rows:
        """Read the rows of a record batch that has the `token_columns`; raises InvalidInput."""

    def targets(self, batch: Any, source: RowSource) -> Targets:
        """Read the targets [P] of a record batch that has the `target_columns`; raises InvalidInput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Origin of a file's rows, kept in its schema metadata as JSON, one key per attribute."""

    identity: TeacherIdentity
    fields: Fields
    encoding: Mapping[str, JSON]
    """Name and error bound of the encoding from which the targets were read."""
    corpus: Mapping[str, JSON]
    """`name`, `fingerprint`, `tokenizer_sha256` and `vocab_size`."""
    shard: Mapping[str, JSON]
    """`index`, `first_row` and `rows`."""
    provenance: Provenance

    @classmethod
    def of_shard(cls, targets: TargetSet, shard: int, fields: Fields) -> Origin:
        """Describe a committed shard of a target set."""
        corpus = targets.corpus
        first, last = (int(row) for row in corpus.shard_rows[shard : shard + 2])
        commit = targets.sets[0].commits.of(shard)
        assert commit is not None, "only committed shards are exported"
        return cls(
            identity=targets.identity,
            fields=fields,
            encoding=targets.encoding.to_json(),
            corpus={name: getattr(corpus, name) for name in ("name", "fingerprint", "tokenizer_sha256", "vocab_size")},
            shard={"index": shard, "first_row": first, "rows": last - first},
            provenance=commit.provenance,
        )

    def to_metadata(self) -> dict[bytes, bytes]:
        """Convert to schema metadata."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: value.to_json() if hasattr(value, "to_json") else dict(value) for name, value in values.items()}
        return {
            _VERSION_KEY: _VERSION.encode(),
            **{f"potstill.{name}".encode(): json.dumps(value).encode() for name, value in plain.items()},
        }

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[bytes, bytes] | None) -> Origin | None:
        """Read what `to_metadata` wrote; None when the file has no such metadata.

        Raises:
            InvalidInput: the metadata is of another version, or damaged.
        """
        version = (metadata or {}).get(_VERSION_KEY)
        if metadata is None or version is None:
            return None
        if version != _VERSION.encode():
            raise InvalidInput(f"{path} has row version {version[:40]!r}, this version reads {_VERSION!r}; update it")
        try:
            value = {name: json.loads(metadata[f"potstill.{name}".encode()]) for name in cls.__dataclass_fields__}
            return cls(
                identity=TeacherIdentity.from_json(value["identity"]),
                fields=Fields.from_json(value["fields"]),
                encoding=dict(value["encoding"]),
                corpus={name: value["corpus"][name] for name in ("name", "fingerprint", "tokenizer_sha256")},
                shard={name: int(value["shard"][name]) for name in ("index", "first_row", "rows")},
                provenance=Provenance.from_json(value["provenance"]),
            )
        except (KeyError, TypeError, ValueError, FormatError, InvalidInput) as error:
            raise InvalidInput(f"{path} has schema metadata of potstill that cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Outcome of an export."""

    files_written: int
    files_before: int
    """Files that an earlier run had finished."""
    num_bytes: int
    """Bytes of all files, earlier ones included."""


def export_shards(
    targets: TargetSet,
    folder: Path,
    form: RowFormat,
    shards: range,
    *,
    fields: Fields,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ExportReport:
    """Write one file for each shard, with the given fields; K is at most the one that is kept.

    `on_progress` gets the positions that are done, and all positions.

    Raises:
        NotCommitted: a shard has no targets; nothing was written.
        SpecMismatch: the folder has a shard's file from another export. StoreError: the folder cannot be written.
    """
    missing = [shard for shard in shards if not targets.is_committed(shard)]
    if missing:
        lacking = [each for each in targets.sets if any(each.commits.of(shard) is None for shard in missing)]
        ways = ", and ".join(each.spec.way_to_fill for each in lacking)
        raise NotCommitted(
            f"teacher {targets.teacher!r} lacks {len(missing):,} of {counted(len(shards), 'shard')}, the first is "
            f"{missing[0]}; run {ways}, or take --shards that have"
        )
    with store_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    starts = targets.corpus.shard_starts
    total = int(sum(starts[shard + 1] - starts[shard] for shard in shards))
    done = written = 0
    for shard in shards:
        path = folder / form.file_name(shard)
        schema = form.schema().with_metadata(Origin.of_shard(targets, shard, fields).to_metadata())
        if not _is_finished(path, schema):
            blocks = _shard_blocks(targets, shard, fields.k)
            on_progress(done, total)
            _write_file(path, schema, (form.to_batch(*block) for block in blocks))
            written += 1
        done += int(starts[shard + 1] - starts[shard])
        on_progress(done, total)
    sizes = sum((folder / form.file_name(shard)).stat().st_size for shard in shards)
    return ExportReport(written, len(shards) - written, sizes)


def _shard_blocks(targets: TargetSet, shard: int, k: int) -> Iterator[tuple[Rows, Targets]]:
    corpus = targets.corpus
    first, last = (int(row) for row in corpus.shard_rows[shard : shard + 2])
    starts = corpus.row_starts[first : last + 1]
    ends = None
    if corpus.spec.num_documents is not None:
        ends = np.isin(np.arange(first + 1, last + 1), corpus.document_rows)
    for row, stop in row_batches(starts, BLOCK_POSITIONS):
        start, end = int(starts[row]), int(starts[stop])
        rows = Rows(
            np.diff(starts[row : stop + 1]),
            corpus.tokens(start, end),
            ends_document=None if ends is None else ends[row:stop],
            loss_mask=corpus.loss_mask(start, end) if corpus.has_loss_mask else None,
        )
        yield rows, targets.read(start, end, k=k)


def _is_finished(path: Path, schema: Any) -> bool:
    """Tell whether an earlier run of the same export wrote this file.

    Raises:
        SpecMismatch: a different file has its name.
    """
    if not path.exists():
        return False
    try:
        found = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SpecMismatch(f"{path} is not a file of an export: {error}; export to an empty folder") from error
    if not found.equals(schema):
        raise SpecMismatch(f"{path} has other columns than this export; export to an empty folder")
    for key, value in schema.metadata.items():
        if (found.metadata or {}).get(key) != value:
            raise SpecMismatch(f"{path} is of another export ({key.decode()} differs); export to an empty folder")
    return True


def _write_file(path: Path, schema: Any, batches: Iterator[Any]) -> None:
    """Write a file under another name, then rename it: a file under its own name is always whole."""
    partial = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}.partial")
    try:
        with store_errors(str(path)):
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                for batch in batches:
                    writer.write_batch(batch)
            # Before the rename: a power cut after it must not leave the final name on an empty file.
            fsync(partial)
            partial.replace(path)
    finally:
        # Remove what killed runs left of this shard: nobody reads a partial file again.
        for stale in path.parent.glob(f".{path.stem}-*.partial"):
            stale.unlink(missing_ok=True)
