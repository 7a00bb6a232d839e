"""Documents of Parquet files, and of Arrow files as the `datasets` library saves them: one a row of a column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from potstill.cache.corpus.sources.completions import completion
from potstill.cache.corpus.sources.documents import BadRecord, BadRecords, Document, Field
from potstill.cache.corpus.sources.files import SourceFile
from potstill.cache.corpus.sources.records import document, others, without_nulls
from potstill.cache.errors import InvalidInput

_BATCH_ROWS = 1024
_FILE_FORMAT = b"ARROW1"


def parquet_documents(file: SourceFile, field: Field, bad: BadRecords) -> Iterator[Document]:
    """Read the documents of a Parquet file.

    Raises:
        InvalidInput: it is none, or has no such column.
    """
    try:
        with pq.ParquetFile(file.path) as table:
            _require_column(file, field, table.schema_arrow)
            columns = None if field.whole or field.kind == "completion" else [field.name]
            yield from _documents(table.iter_batches(batch_size=_BATCH_ROWS, columns=columns), file, field, bad)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{file.path} cannot be read as Parquet: {error}") from error


def arrow_documents(file: SourceFile, field: Field, bad: BadRecords) -> Iterator[Document]:
    """Read the documents of an Arrow file, in the stream format, as of `save_to_disk`, or the file format.

    Raises:
        InvalidInput: it is none, or has no such column.
    """
    try:
        with pa.memory_map(str(file.path)) as mapped:
            is_file = mapped.read(len(_FILE_FORMAT)) == _FILE_FORMAT
            mapped.seek(0)
            with pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped) as reader:
                _require_column(file, field, reader.schema)
                batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
                yield from _documents(batches, file, field, bad)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{file.path} cannot be read as Arrow: {error}") from error


def _require_column(file: SourceFile, field: Field, schema: pa.Schema) -> None:
    if field.kind != "completion" and field.name not in schema.names:
        raise InvalidInput(f"{file.path} has no column {field.name!r}; {others(schema.names, field)}")


def _documents(batches: Iterator[Any], file: SourceFile, field: Field, bad: BadRecords) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for index in range(batch.num_rows):
            where = f"{file.path}: row {row}"
            row += 1
            try:
                found = _document(batch, index, field, where)
            except BadRecord as error:
                bad.add(str(error))
            else:
                yield found


def _document(batch: Any, index: int, field: Field, where: str) -> Document:
    if field.kind == "completion":
        return completion(_record(batch, index, where), field, where)
    record = _record(batch, index, where) if field.whole else None
    return document(_value(batch.column(field.name)[index], field, where), field, where, record)


def _record(batch: Any, index: int, where: str) -> dict[str, Any]:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error


def _value(value: Any, field: Field, where: str) -> Any:
    if not value.is_valid:
        return None
    if field.kind == "ids" and isinstance(value, pa.ListScalar):
        ids = value.values
        # A null among them, or numbers that are no integers, are shown as they are.
        return ids.to_numpy() if not ids.null_count and pa.types.is_integer(ids.type) else ids.slice(0, 8).to_pylist()
    try:
        found = value.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where}: column {field.name!r} is not UTF-8: {error.reason} at byte {error.start}") from error
    return [without_nulls(each) for each in found] if field.kind == "messages" and isinstance(found, list) else found
